// Barriers in shared memory that count arrivals and bytes (PTX ISA, mbarrier; sm_90 and newer).
#pragma once

#include <cstdint>

namespace sk {

// All of them take the shared address of a barrier: 8 bytes on an 8-byte border.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// `count` of them, side by side.
__device__ __forceinline__ void barriers_init(uint32_t first, int count, int arrivals) {
  for (int n = 0; n < count; ++n) barrier_init(first + 8 * n, arrivals);
}
// What was initialised is seen by the cluster and by copies, after a barrier.
__device__ __forceinline__ void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives when all cp.async of this thread so far are complete.
__device__ __forceinline__ void barrier_arrive_behind_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}
// Waits for the end of a phase: of even ones if `phase` is 0.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

}  // namespace sk
