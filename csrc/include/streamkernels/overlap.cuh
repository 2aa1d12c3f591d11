// Programmatic dependent launch: a kernel is set up while the one before it still runs. Hopper and newer; elsewhere
// these do nothing, and launches follow one another.
#pragma once

namespace sk {

// The kernel that was launched with the attribute may be set up from here on; called by all threads.
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before is complete and its memory visible.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace sk
