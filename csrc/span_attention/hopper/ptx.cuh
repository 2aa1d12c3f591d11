// Hopper's own instructions, as far as this kernel alone needs them (PTX ISA; sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sk::span_attention::hopper {

__device__ __forceinline__ char* dynamic_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// A box of a tensor [B, heads, rows, D] to shared memory, counted by a barrier; zeros for what lies outside.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int head, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(b)
      : "memory");
}
// And back; what lies outside is not written. Closes the group of this thread's stores since the last one.
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, int column, int row, int head, int b) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
               "r"(from), "r"(column), "r"(row), "r"(head), "r"(b)
               : "memory");
}
__device__ __forceinline__ void close_stores() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// Until what this thread's stores read may be overwritten.
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Four 8 x 8 matrices to shared memory; lane i names the row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// A barrier of so many of the block's threads.
template <int THREADS>
__device__ __forceinline__ void meet(int barrier) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Registers of the threads of a warpgroup, from here on.
template <int FEWER>
__device__ __forceinline__ void hand_in_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(FEWER));
}
template <int MORE>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(MORE));
}

// A copy in a register of its own: ptxas would rather write it where products still read, and wait for those (C7513).
__device__ __forceinline__ uint32_t apart(uint32_t x) {
  uint32_t y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace sk::span_attention::hopper
