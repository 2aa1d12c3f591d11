// Blocks that share their shared memory (sm_90 and later); elsewhere a cluster is one block.
#pragma once

#include <cstdint>

namespace sk::incremental_prefill {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SK_CLUSTERS 1
#else
#define SK_CLUSTERS 0
#endif

// log2 of the blocks of a cluster. Asked again rather than kept in a register during the products.
__device__ __forceinline__ int cluster_log() {
#if SK_CLUSTERS
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;\n" : "=r"(n));
  return 31 - __clz(n);
#else
  return 0;
#endif
}

// All threads of all blocks of the cluster; what they wrote before is seen after.
__device__ __forceinline__ void cluster_barrier() {
#if SK_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

// The same for shared memory that was only read: global writes under way are not waited for.
__device__ __forceinline__ void cluster_barrier_after_reads() {
#if SK_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
#endif
}

// The address of `shared` in block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote(uint32_t shared, int rank) {
#if SK_CLUSTERS
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(r) : "r"(shared), "r"(rank));
  return r;
#else
  return shared;
#endif
}
__device__ __forceinline__ float4 load_remote4(uint32_t from) {
  float4 x;
#if SK_CLUSTERS
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from)
               : "memory");
#else
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from)
               : "memory");
#endif
  return x;
}
__device__ __forceinline__ float2 load_remote2(uint32_t from) {
  float2 x;
#if SK_CLUSTERS
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
#else
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
#endif
  return x;
}

}  // namespace sk::incremental_prefill
