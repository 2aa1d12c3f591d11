// Barriers in shared memory that count arrivals and bytes (PTX ISA, mbarrier; sm_90 and newer), and copies from one
// block's shared memory to another's that report to them.
#pragma once

#include <cstdint>

namespace sk::incremental_prefill {

// All of them take the shared address of a barrier: 8 bytes on an 8-byte border.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
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

// `bytes` (a multiple of 16, on 16-byte borders) to a shared address of the cluster; counted by a barrier of the same
// block there. The source must stay as it is until that barrier says so.
__device__ __forceinline__ void push(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ int cluster_blocks() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;\n" : "=r"(n));
  return n;
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;\n" : "=r"(n));
  return n;
}
__device__ __forceinline__ int cluster_index() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%clusterid.x;\n" : "=r"(n));
  return n;
}

// Barriers of a block, by threads of which kind they are met.
constexpr int kReadersMeet = 1, kLoadersMeet = 2, kLoadersReady = 3;
template <int BARRIER, int THREADS>
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(BARRIER), "n"(THREADS) : "memory");
}
// Is counted there, and goes on.
template <int BARRIER, int THREADS>
__device__ __forceinline__ void tell() {
  asm volatile("bar.arrive %0, %1;\n" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// The two halves of a cluster's barrier: barriers that were published before the one are seen behind the other.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

}  // namespace sk::incremental_prefill
