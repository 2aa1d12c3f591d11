// span_attention's kernel for many rows run on the host: its own source but for ptx.cuh, barrier.cuh and wgmma.cuh.
#include "hopper_on_host.h"

#include "span_attention/hopper/kernel.cuh"

namespace {
constexpr int kProcessors = 2;
unsigned seed;
host::Pace pace = host::Pace::kAtOnce;
}  // namespace

// 0: what is begun happens at once; 1: as late as it may; 2: any time between
extern "C" __attribute__((visibility("default"))) void set_pace(int how, unsigned from) {
  pace = static_cast<host::Pace>(how), seed = from;
}

extern "C" __attribute__((visibility("default"))) int divide(int n, int d) {
  return sk::span_attention::hopper::Divisor::of(d).quotient(n);
}

namespace sk::span_attention::hopper {

namespace {

Rows rows_first(void* data, int heads, int rows, int D) {
  const int64_t row = int64_t{heads} * D;
  return {data, rows * row, D, row};
}
CUtensorMap map_of(const Rows& x, int heads, int rows, const Params& p, int box) {
  return {static_cast<char*>(x.data), {2, 2 * x.row, 2 * x.head, 2 * x.batch}, {p.D, rows, heads, p.B}, box};
}

// One block after the other: the first one takes what the others do not begin with.
template <typename Kernel, typename... Args>
void run(Kernel kernel, int items, const Args&... args) {
  const unsigned blocks = static_cast<unsigned>(std::min(items, kProcessors));
  for (unsigned block = 0; block < blocks; ++block) {
    host::prepare(seed + block, pace);
    host::launch_one(kernel, block, blocks, kThreads, args...);
    host::tidy_up();
  }
}

template <class S>
void attend(const Params& p, const Call& c) {
  static_assert(S::kShared <= host::kMemory, "");
  const CUtensorMap q = map_of(p.q, p.H, p.T, p, kRows), k = map_of(p.k, p.HK, p.S, p, S::kKeys),
                    v = map_of(p.v, p.HK, p.S, p, S::kKeys),
                    o = map_of(rows_first(p.o, p.H, p.T, p.D), p.H, p.T, p, 16);
  run(attend_kernel<S>, c.items, q, k, v, o, c);
}

}  // namespace

bool here(int) {
  return true;
}
void preload(int) {}

void launch(const Params& p, int* tickets, DType dtype, int, uintptr_t) {
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  const Call c = make_call(p, tickets);
  if (dtype == DType::kFloat16) return p.D == 64 ? attend<Shape<Float16, 64>>(p, c) : attend<Shape<Float16, 128>>(p, c);
  return p.D == 64 ? attend<Shape<BFloat16, 64>>(p, c) : attend<Shape<BFloat16, 128>>(p, c);
}

}  // namespace sk::span_attention::hopper
