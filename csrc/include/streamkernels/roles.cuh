// Roles of rows: which segment a row is written to, and how many earlier rows of the same role there are.
#pragma once

#include <cstdint>

#include "streamkernels/platform.h"

namespace sk {

constexpr int kSource = 0;
constexpr int kTarget = 1;  // any other value is padding: nothing is written

struct Counts {
  int source, target;
};

// Adds the source and target rows among 16 roles. A byte that compares equal turns into eight set bits.
__device__ __forceinline__ void count_vector(const uint4& w, Counts& counts) {
  constexpr uint32_t kSources = 0x00000000u, kTargets = 0x01010101u;
  counts.source += (__popc(__vcmpeq4(w.x, kSources)) + __popc(__vcmpeq4(w.y, kSources)) +
                    __popc(__vcmpeq4(w.z, kSources)) + __popc(__vcmpeq4(w.w, kSources))) >>
                   3;
  counts.target += (__popc(__vcmpeq4(w.x, kTargets)) + __popc(__vcmpeq4(w.y, kTargets)) +
                    __popc(__vcmpeq4(w.z, kTargets)) + __popc(__vcmpeq4(w.w, kTargets))) >>
                   3;
}

// Adds the calling thread's share of roles [begin, end): the block's sum is the whole count.
__device__ __forceinline__ void count_bytes(const int8_t* role, int64_t stride, int begin, int end, Counts& counts) {
#pragma unroll 1
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const int8_t r = role[i * stride];
    counts.source += r == kSource;
    counts.target += r == kTarget;
  }
}

// The calling thread's share of the source and target rows among the first `n`.
__device__ __forceinline__ Counts count_roles(const int8_t* role, int64_t stride, int n) {
  Counts counts{0, 0};
  if (stride != 1) {
    count_bytes(role, stride, 0, n, counts);
    return counts;
  }
  // bytes up to the first 16-byte border, then 16 at a time, then the rest
  const int border = static_cast<int>(-reinterpret_cast<uintptr_t>(role) & 15);
  const int head = border < n ? border : n;
  const int vectors = (n - head) / 16;
  const uint4* wide = reinterpret_cast<const uint4*>(role + head);
  constexpr int kInFlight = 4;
  constexpr uint32_t kPadding = 0xffffffffu;
  count_bytes(role, 1, 0, head, counts);
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += kInFlight * blockDim.x) {
    uint4 w[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int at = i + u * blockDim.x;
      w[u] = at < vectors ? __ldg(wide + at) : make_uint4(kPadding, kPadding, kPadding, kPadding);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) count_vector(w[u], counts);
  }
  count_bytes(role, 1, head + 16 * vectors, n, counts);
  return counts;
}

}  // namespace sk
