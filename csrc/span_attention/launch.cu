#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>

#include "span_attention/kernel.cuh"
#include "streamkernels/error.h"
#include "streamkernels/overlap.cuh"
#include "streamkernels/runtime.h"

namespace sk::span_attention {
namespace {

constexpr int kMaxDevices = 64;
using Kernel = void (*)(Params, Plan);

template <typename Element, int ROWS>
Kernel choose(int D) {
  switch (D) {
    case 64:
      return span_attention_kernel<Element, 64, ROWS>;
    case 96:
      return span_attention_kernel<Element, 96, ROWS>;
    case 128:
      return span_attention_kernel<Element, 128, ROWS>;
    default:
      return span_attention_kernel<Element, 256, ROWS>;
  }
}

Kernel choose(DType dtype, int D, int rows) {
  if (dtype == DType::kFloat16) return rows == 16 ? choose<Float16, 16>(D) : choose<Float16, 64>(D);
  return rows == 16 ? choose<BFloat16, 16>(D) : choose<BFloat16, 64>(D);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "span_attention: asking for the device's shared memory");
  return value;
}

Machine machine_of(int device) {
  static std::atomic<int> of_block[kMaxDevices], of_processor[kMaxDevices];
  const int processors = multiprocessors(device);
  if (of_processor[device].load() == 0) {
    of_block[device] = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    of_processor[device] = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  return {processors, of_block[device], of_processor[device]};
}

// Loads the kernel onto the device and allows it the shared memory of its most stages; once per device and instance.
void allow(Kernel kernel, int device) {
  const Machine machine = machine_of(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "span_attention: loading the kernel");
  const int most = machine.shared_of_block - static_cast<int>(attributes.sharedSizeBytes);
  if (attributes.maxDynamicSharedSizeBytes >= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "span_attention: asking for shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "span_attention: asking for shared memory");
}

bool known_dim(int D) {
  return D == 64 || D == 96 || D == 128 || D == 256;
}

}  // namespace

int splits(const Params& params, int device) {
  return make_plan(params, machine_of(device)).splits;
}

void launch(const Params& p, int splits, DType dtype, int device, uintptr_t stream) {
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  if (!known_dim(p.D)) throw NotSupported("span_attention: q: the CUDA kernel takes a head dim of 64, 96, 128 or 256");
  Plan plan = make_plan(p, machine_of(device));
  plan.splits = splits;
  const int64_t blocks = static_cast<int64_t>(plan.tiles) * p.B * p.HK * plan.splits;
  if (blocks > INT32_MAX) throw std::invalid_argument("span_attention: q: too many rows for one launch");
  const DeviceGuard guard(device);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const Kernel kernel = choose(dtype, p.D, plan.rows);
  static std::atomic<uint64_t> allowed[2][2][4];
  std::atomic<uint64_t>& done = allowed[dtype == DType::kFloat16][plan.rows == 16][p.D == 256 ? 3 : p.D / 32 - 2];
  if (!(done.load() >> device & 1)) {
    allow(kernel, device);
    done |= uint64_t{1} << device;
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, plan.shared, on>>>(p, plan);
  check_launch("span_attention");
  if (plan.splits == 1) return;
  const Kernel join = dtype == DType::kFloat16 ? join_kernel<Float16> : join_kernel<BFloat16>;
  launch_overlapped("span_attention: joining the splits", join, static_cast<int64_t>(p.B) * p.H * p.T, kThreads, 0,
                    device, stream, p, plan);
}

void preload(int device) {
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int rows : {16, 64}) {
      for (const int D : {64, 96, 128, 256}) allow(choose(dtype, D, rows), device);
    }
    cudaFuncAttributes attributes;
    const Kernel join = dtype == DType::kFloat16 ? join_kernel<Float16> : join_kernel<BFloat16>;
    check(cudaFuncGetAttributes(&attributes, join), "span_attention: loading the kernel");
  }
}

}  // namespace sk::span_attention
