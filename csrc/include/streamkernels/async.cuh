// Copies from global to shared memory that go on while the thread computes, sm_80 and newer.
#pragma once

#include <cstdint>

namespace sk {

// 16 bytes, both sides on a 16-byte border, if `really`: a predicate instead of a branch
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool really) {
  asm volatile(
      "{\n\t.reg .pred really;\n\tsetp.ne.b32 really, %2, 0;\n\t"
      "@really cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n\t}" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(really))
      : "memory");
}
// the same, and zeros if not
__device__ __forceinline__ void copy_or_clear_async(uint32_t shared, const void* global, bool really) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(really ? 16 : 0)
               : "memory");
}
// closes the group of copies begun since the last one
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// waits until at most N of this thread's latest groups are under way
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace sk
