#include <cuda_runtime.h>

#include "select_tokens/kernel.cuh"
#include "streamkernels/overlap.cuh"
#include "streamkernels/runtime.h"

namespace sk::select_tokens {
namespace {

using Kernel = void (*)(Params, int);

Kernel choose(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return select_tokens_kernel<float>;
    case DType::kFloat16:
      return select_tokens_kernel<Float16>;
    default:
      return select_tokens_kernel<BFloat16>;
  }
}

}  // namespace

void launch(const Params& p, DType dtype, int device, uintptr_t stream) {
  if (p.B == 0) return;
  const DeviceGuard guard(device);
  const int blocks = blocks_for(p, multiprocessors(device));
  launch_overlapped("select_tokens", choose(dtype), static_cast<int64_t>(p.B) * blocks, threads_for(p.K), 0, device,
                    stream, p, blocks);
}

void preload(int device) {
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, choose(dtype)), "select_tokens: loading the kernel");
  }
}

}  // namespace sk::select_tokens
