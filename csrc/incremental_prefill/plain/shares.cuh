// Who joins which rows where clusters share an item of a plain session.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "incremental_prefill/merge.cuh"
#endif

namespace sk::incremental_prefill {

// Called by one thread of a block that has written its rows down, as `parts` blocks do: which shares of the rows are
// its, a bit each. Each of the last `shares` blocks to count themselves in takes one. Who is early waits for the last
// one, but no longer than `patience` cycles, since that one may not be running; who leaves says so, and the last one
// takes its share. `counter`: how many have arrived, then a bit for each share that was left, 16 at most; zero for the
// next launch.
__device__ __forceinline__ uint32_t take_shares(uint32_t* counter, int parts, int shares, int patience) {
  constexpr uint32_t kCount = 0xffff, kLeft = 16;
  const uint32_t before = count_in(counter);
  const uint32_t arrived = (before & kCount) + 1;
  const int share = static_cast<int>(arrived) - 1 - (parts - shares);
  uint32_t own = share < 0 ? 0 : 1u << share;
  if (static_cast<int>(arrived) == parts) {
    // an addition, which hands on what the others released
    atomicAdd(counter, 0u - (before + 1));
    own |= before >> kLeft;
  } else if (share >= 0) {
    const long long begin = clock64();
    for (;;) {
      const uint32_t now = look_at(counter), count = now & kCount;
      if (static_cast<int>(count) == parts || count < arrived) break;
      if (clock64() - begin < patience) continue;
      if (atomicCAS(counter, now, now | own << kLeft) == now) {
        own = 0;
        break;
      }
    }
  }
  return own;
}

#if defined(__CUDACC__)

// The same for all threads of the block, behind what they wrote.
__device__ __forceinline__ uint32_t shares_of_block(uint32_t* counter, int parts, int shares, int patience,
                                                    uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) *flag = take_shares(counter, parts, shares, patience);
  __syncthreads();
  return *flag;
}

#endif

}  // namespace sk::incremental_prefill
