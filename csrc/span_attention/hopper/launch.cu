#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "span_attention/hopper/kernel.cuh"
#include "span_attention/hopper/maps.h"
#include "streamkernels/error.h"
#include "streamkernels/runtime.h"

namespace sk::span_attention::hopper {
namespace {

constexpr int kMaxDevices = 64;
using Kernel = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, Call);

struct Instance {
  Kernel kernel;
  int shared;
};
template <typename Element>
Instance choose(int D) {
  if (D == 64) return {attend_kernel<Shape<Element, 64>>, Shape<Element, 64>::kShared};
  return {attend_kernel<Shape<Element, 128>>, Shape<Element, 128>::kShared};
}
Instance choose(DType dtype, int D) {
  return dtype == DType::kFloat16 ? choose<Float16>(D) : choose<BFloat16>(D);
}

// An image for GPUs without warpgroup products has nothing in it.
constexpr int kRegistersOfSomething = 64;

// Loads the kernels onto the device, and allows them their shared memory: whether it can run them.
bool allow(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking the device");
  if (major != 9 || minor != 0) return false;
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int D : {64, 128}) {
      const Instance instance = choose(dtype, D);
      cudaFuncAttributes attributes{};
      check(cudaFuncGetAttributes(&attributes, instance.kernel), "span_attention: loading the kernel");
      if (attributes.numRegs < kRegistersOfSomething) return false;
      check(cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, instance.shared),
            "span_attention: asking for shared memory");
    }
  }
  return true;
}

}  // namespace

const char* refuses(const Params& p, int device) {
  if (!here(device))
    return "span_attention: q: the kernel for many rows needs compute capability 9.0, and a build for 90a";
  if (p.D != 64 && p.D != 128) return "span_attention: q: the kernel for many rows takes a head dim of 64 or 128";
  const bool attends = std::all_of(p.rules, p.rules + p.N, [](Rule rule) { return rule == kAttend; });
  if (p.N > kMaxSlots || !attends)
    return "span_attention: rules: the kernel for many rows takes one or two ATTEND slots";
  if (p.softcap != 0) return "span_attention: softcap: the kernel for many rows has none";
  if (p.S < 1) return "span_attention: k: the kernel for many rows needs a key";
  return nullptr;
}

bool here(int device) {
  static std::atomic<int> known[kMaxDevices];  // 1: no, 2: yes
  if (device < 0 || device >= kMaxDevices) return false;
  if (known[device].load() == 0) known[device] = allow(device) ? 2 : 1;
  return known[device].load() == 2;
}

void launch(const Params& p, int* tickets, DType dtype, int device, uintptr_t stream) {
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  if (const char* why = refuses(p, device)) throw NotSupported(why);
  const DeviceGuard guard(device);
  const Instance instance = choose(dtype, p.D);
  const Call c = make_call(p, tickets);
  const CUtensorMap q = map_of(p.q, dtype, p.B, p.H, p.T, p.D, 128), k = map_of(p.k, dtype, p.B, p.HK, p.S, p.D, 128),
                    v = map_of(p.v, dtype, p.B, p.HK, p.S, p.D, 128);
  const CUtensorMap o = map_of_rows_first(p.o, dtype, p.B, p.H, p.T, p.D, 16);
  const int blocks = std::min(c.items, multiprocessors(device));
  launch_overlapped("span_attention", instance.kernel, blocks, kThreads, instance.shared, device, stream, q, k, v, o,
                    c);
}

void preload(int device) {
  here(device);
}

}  // namespace sk::span_attention::hopper
