#include <cuda_runtime.h>

#include <stdexcept>

#include "compact/kernel.cuh"
#include "streamkernels/runtime.h"

namespace sk::compact {
namespace {

using Kernel = void (*)(Params, Plan);

Kernel choose(int unit) {
  switch (unit) {
    case 16:
      return compact_kernel<uint4>;
    case 8:
      return compact_kernel<uint2>;
    case 4:
      return compact_kernel<uint32_t>;
    case 2:
      return compact_kernel<uint16_t>;
    default:
      return compact_kernel<uint8_t>;
  }
}

}  // namespace

void launch(const Params& params, int size, int device, uintptr_t stream) {
  if (params.B == 0 || params.O == 0 || params.K == 0 || params.I == 0 || params.C == 0) return;
  const int unit = unit_of(params, size);
  const Params p = in_units(params, size, unit);
  const Plan plan = make_plan(p);
  if (plan.blocks > INT32_MAX) throw std::invalid_argument("compact: x: too many rows for one launch");
  const DeviceGuard guard(device);
  const Kernel kernel = choose(unit);
  kernel<<<static_cast<unsigned>(plan.blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(p, plan);
  check_launch("compact");
}

void preload(int device) {
  const DeviceGuard guard(device);
  for (const int unit : {16, 8, 4, 2, 1}) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, choose(unit)), "compact: loading the kernel");
  }
}

}  // namespace sk::compact
