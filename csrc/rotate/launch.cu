#include <cuda_runtime.h>

#include <stdexcept>

#include "rotate/kernel.cuh"
#include "streamkernels/runtime.h"

namespace sk::rotate {
namespace {

using Kernel = void (*)(Params, Plan);

template <typename Element>
Kernel choose(bool vectors, bool interleaved) {
  constexpr int kWidth = 16 / sizeof(Element);
  if (!vectors) return interleaved ? rotate_kernel<Element, 1, true> : rotate_kernel<Element, 1, false>;
  return interleaved ? rotate_kernel<Element, kWidth, true> : rotate_kernel<Element, kWidth, false>;
}

Kernel choose(DType dtype, bool vectors, bool interleaved) {
  switch (dtype) {
    case DType::kFloat32:
      return choose<float>(vectors, interleaved);
    case DType::kFloat16:
      return choose<Float16>(vectors, interleaved);
    default:
      return choose<BFloat16>(vectors, interleaved);
  }
}

}  // namespace

void launch(const Params& p, DType dtype, int device, uintptr_t stream) {
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  const int width = access_width(p, size_of(dtype));
  const Plan plan = make_plan(p, width, multiprocessors(device));
  if (plan.blocks > INT32_MAX) throw std::invalid_argument("rotate: x: too many rows for one launch");
  const DeviceGuard guard(device);
  const Kernel kernel = choose(dtype, width > 1, p.interleaved);
  kernel<<<static_cast<unsigned>(plan.blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(p, plan);
  check_launch("rotate");
}

void preload(int device) {
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const bool vectors : {false, true}) {
      for (const bool interleaved : {false, true}) {
        cudaFuncAttributes attributes;
        const Kernel kernel = choose(dtype, vectors, interleaved);
        check(cudaFuncGetAttributes(&attributes, kernel), "rotate: loading the kernel");
      }
    }
  }
}

}  // namespace sk::rotate
