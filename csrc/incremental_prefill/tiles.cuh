// How rows of keys and values lie in shared memory, and how they get there.
//
// A tile is cut into panels of 64 columns; in a panel, row r keeps its 16-byte chunk c at place c ^ (r % 8), so that
// eight neighbouring rows of one chunk lie in different banks. The last panel of D = 96 has 32 columns.
#pragma once

#include <cstdint>

#include "incremental_prefill/plan.h"
#include "streamkernels/mma.cuh"
#include "streamkernels/slots.cuh"
#include "streamkernels/wgmma.cuh"

namespace sk::incremental_prefill {

// Sizes of one instance. WARPS_M warps share out the query rows, 16 each; WARPS_S warps the keys of a tile.
template <typename ELEMENT, int HEAD_DIM, int WARPS_M, int WARPS_S, int BLOCK_S>
struct Shape {
  using Element = ELEMENT;
  static constexpr int D = HEAD_DIM;
  static constexpr int kWarpsM = WARPS_M, kWarpsS = WARPS_S;
  static constexpr int kRows = 16 * WARPS_M;
  static constexpr int kKeys = BLOCK_S;
  static constexpr int kWarpKeys = BLOCK_S / WARPS_S;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_S;
  static constexpr int kChunks = D / 8;            // 16-byte chunks of a row
  static constexpr int kMatrix = BLOCK_S * D * 2;  // bytes of the keys of a tile, and of its values
  static constexpr int kStage = 2 * kMatrix;
  static constexpr int kQuery = kRows * D * 2;
  static constexpr int kOutRow = D + 8;             // floats between rows of o in shared memory
  static constexpr int kOut = kRows * kOutRow * 4;  // bytes of one warp group's o
  // a group of warps that has all rows loads its own keys, and no other group reads them or waits for them
  static constexpr int kGroup = 32 * WARPS_M;
  static constexpr bool kWgmma = SK_WGMMA && WARPS_M % 4 == 0 && D % 64 == 0;
  // Where there are registers left. Never beside products of a warpgroup: ptxas 13.0 then gave weights the registers of
  // queries that the next tile still needed (64 columns; seen in SASS, and as wrong results).
  static constexpr bool kQueryInRegisters = D <= 128 && WARPS_M == 1;
  // a second copy of the products, for plain tiles: worth its size beside warpgroup products
  static constexpr bool kPlainLoop = kWgmma;
  // instructions that save waiting, where they were measured to pay
  static constexpr bool kEager = SK_WGMMA && D % 64 == 0;
  static_assert(kWarpKeys % 16 == 0 && D % 32 == 0, "whole 16 x 16 blocks");
};

// Byte of chunk `c` of row `r` in a tile of ROWS rows.
template <int D, int ROWS>
__device__ __forceinline__ int chunk_at(int r, int c) {
  const int panel = c / 8;
  if (D % 64 == 0 || panel < D / 64) return panel * ROWS * 128 + r * 128 + ((c % 8) ^ (r % 8)) * 16;
  return panel * ROWS * 128 + r * 64 + ((c % 4) ^ (r / 2 % 4)) * 16;
}

// 16 bytes on their way to shared memory; zeros if not `valid` (nothing is read then). `keep`: how long the L2 should
// keep them, if HINTED.
template <bool HINTED>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid, uint64_t keep) {
  const int bytes = valid ? 16 : 0;
  if constexpr (HINTED) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(to), "l"(from),
                 "r"(bytes), "l"(keep)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void close_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
// Waits until at most `n` of the calling thread's groups are on their way; n at most 4.
__device__ __forceinline__ void wait_groups(int n) {
  switch (n) {
    case 0:
      return wait_groups<0>();
    case 1:
      return wait_groups<1>();
    case 2:
      return wait_groups<2>();
    case 3:
      return wait_groups<3>();
    default:
      return wait_groups<4>();
  }
}

// Addresses of one lane's rows of matrix fragments: chunk 2 i + `half` of its row, for the steps i along D.
template <int D, int ROWS>
struct Lane {
  uint32_t base, tail;  // of whole panels, of the last half panel

  __device__ __forceinline__ Lane(int row, int half)
      : base(row * 128 + (half ^ (row % 8)) * 16), tail(D / 64 * ROWS * 128 + row * 64 + (half ^ (row / 2 % 4)) * 16) {}
  // `tile` lies on a 1024-byte border; `down`: whole blocks of 16 rows below
  __device__ __forceinline__ uint32_t at(uint32_t tile, int i, int down) const {
    if (D % 64 == 0 || i < D / 64 * 4) {
      return ((tile + base) ^ (i % 4 * 32)) + i / 4 * ROWS * 128 + down * 16 * 128;
    }
    return ((tile + tail) ^ (i % 2 * 32)) + down * 16 * 64;
  }
};

}  // namespace sk::incremental_prefill
