// The barriers of plain sessions' blocks, and copies from one block's shared memory to another's that report to one.
#pragma once

#include <cstdint>

#include "streamkernels/barrier.cuh"

namespace sk::incremental_prefill {

// `bytes` (a multiple of 16, on 16-byte borders) to a shared address of the cluster; counted by a barrier of the same
// block there. The source must stay as it is until that barrier says so.
__device__ __forceinline__ void push(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Two floats to a shared address of the cluster, counted there by a barrier of the same block.
__device__ __forceinline__ void push(uint32_t to, float x, float y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(to), "f"(x),
               "f"(y), "r"(barrier)
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
constexpr int kReadersMeet = 1, kLoadersMeet = 2, kLoadersReady = 3, kParked = 4;
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
