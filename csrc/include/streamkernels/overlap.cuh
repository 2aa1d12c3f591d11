// Programmatic dependent launch: a kernel is set up while the one before it still runs. Hopper and newer; elsewhere
// launches follow one another.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <atomic>

#include "streamkernels/runtime.h"
#endif

namespace sk {

#if defined(__CUDACC__)

// The kernel that was launched with `launch_overlapped` may be set up from here on; called by all threads.
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before is complete and its memory visible: first thing in a kernel that is launched so.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline bool can_overlap(int device) {
  constexpr int kMaxDevices = 64, kSince = 9;
  static std::atomic<int> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return false;
  int major = known[device].load(std::memory_order_relaxed);
  if (major == 0) {
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the capability");
    known[device].store(major, std::memory_order_relaxed);
  }
  return major >= kSince;
}

// Launches a kernel that begins with wait_for_launch_before(); `shared` bytes of dynamic shared memory.
template <typename... Args>
void launch_overlapped(const char* what, void (*kernel)(Args...), int64_t blocks, int threads, int shared, int device,
                       uintptr_t stream, const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = can_overlap(device) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

#else

inline void let_next_launch_begin() {}
inline void wait_for_launch_before() {}

#endif

}  // namespace sk
