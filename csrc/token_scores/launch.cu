#include <cuda_runtime.h>

#include <stdexcept>

#include "streamkernels/runtime.h"
#include "token_scores/kernel.cuh"

namespace sk::token_scores {
namespace {

using Kernel = void (*)(Params, Plan);

template <typename Element>
Kernel choose(int lanes) {
  switch (lanes) {
    case 8:
      return token_scores_kernel<Element, 8, 1>;
    case 16:
      return token_scores_kernel<Element, 16, 1>;
    default:
      return token_scores_kernel<Element, 32, 1>;
  }
}

Kernel choose(DType dtype, int lanes, int chunks) {
  switch (dtype) {
    case DType::kFloat32:
      return chunks == 2 ? token_scores_kernel<float, 32, 2> : choose<float>(lanes);
    case DType::kFloat16:
      return choose<Float16>(lanes);
    default:
      return choose<BFloat16>(lanes);
  }
}

}  // namespace

void launch(const Params& p, DType dtype, int device, uintptr_t stream) {
  if (p.B == 0 || p.K == 0) return;
  const Plan plan = make_plan(p, size_of(dtype), multiprocessors(device));
  if (plan.blocks > INT32_MAX) throw std::invalid_argument("token_scores: index: too many keys for one launch");
  const DeviceGuard guard(device);
  const Kernel kernel = choose(dtype, plan.lanes, plan.chunks);
  kernel<<<static_cast<unsigned>(plan.blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(p, plan);
  check_launch("token_scores");
}

void preload(int device) {
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int lanes : {8, 16, 32, 64}) {
      cudaFuncAttributes attributes;
      const Kernel kernel = choose(dtype, lanes, lanes == 64 ? 2 : 1);
      check(cudaFuncGetAttributes(&attributes, kernel), "token_scores: loading the kernel");
    }
  }
}

}  // namespace sk::token_scores
