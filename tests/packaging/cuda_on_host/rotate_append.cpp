// The extension with its kernels run on the host: the real bindings, plan and kernel source, a stand-in for the launch.
#include "cuda_on_host.h"

#include "rotate_append/kernel.cuh"
#include "streamkernels/runtime.h"

// of the machine that plans are made for
int processors = 132;

namespace {

template <typename Element>
auto choose(bool vectors, bool interleaved) {
  using namespace sk::rotate_append;
  constexpr int kWidth = 16 / sizeof(Element);
  if (!vectors) return interleaved ? rotate_append_kernel<Element, 1, true> : rotate_append_kernel<Element, 1, false>;
  return interleaved ? rotate_append_kernel<Element, kWidth, true> : rotate_append_kernel<Element, kWidth, false>;
}

}  // namespace

namespace sk {

std::string unavailable_reason(int) {
  return "";
}
std::string toolkit_version() {
  return "host";
}

namespace rotate_append {

void preload(int) {}

void launch(const Params& p, DType dtype, int, uintptr_t) {
  if (p.B == 0 || p.HK == 0 || p.T == 0) return;
  const int width = access_width(p, size_of(dtype));
  const Plan plan = make_plan(p, width, size_of(dtype), processors);
  const auto kernel = dtype == DType::kFloat32   ? choose<float>(width > 1, p.interleaved)
                      : dtype == DType::kFloat16 ? choose<Float16>(width > 1, p.interleaved)
                                                 : choose<BFloat16>(width > 1, p.interleaved);
  host::launch(kernel, static_cast<unsigned>(plan.blocks), plan.threads, p, plan);
}

}  // namespace rotate_append
}  // namespace sk

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT void set_processors(int count) {
  processors = count;
}

EXPORT int slot_of(int64_t index, int capacity, int sinks, bool bounded) {
  return sk::slot_of(index, capacity, sinks, bounded);
}

// threads, rows, heads, tiles, groups, blocks of a call with aligned tensors
EXPORT void plan_of(int B, int HK, int T, int D, int width, int element_size, bool roles, int64_t* out) {
  sk::rotate_append::Params p{};
  const int8_t role = 0;
  p.B = B;
  p.HK = HK;
  p.T = T;
  p.D = D;
  p.role = roles ? &role : nullptr;
  const auto plan = sk::rotate_append::make_plan(p, width, element_size, processors);
  const int64_t all[] = {plan.threads, plan.rows, plan.heads, plan.tiles, plan.groups, plan.blocks};
  std::copy(std::begin(all), std::end(all), out);
}
}
