// On the host: what streamkernels/mma.cuh and streamkernels/async.cuh do with PTX. A copy is there at once.
#pragma once

#include <cstring>

#include "cuda_on_host.h"
#include "streamkernels/numbers.cuh"

inline void __syncwarp() {}

namespace host {

constexpr int kShared = 96 * 1024;
alignas(16) inline char dynamic[kShared];

}  // namespace host

namespace sk {

inline uint4* dynamic_memory() {
  return reinterpret_cast<uint4*>(host::dynamic);
}

inline uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(static_cast<const char*>(x) - host::dynamic);
}
inline void copy_or_clear_async(uint32_t shared, const void* global, bool really) {
  if (really) {
    std::memcpy(host::dynamic + shared, global, 16);
  } else {
    std::memset(host::dynamic + shared, 0, 16);
  }
}
inline void commit_copies() {}
template <int N>
void wait_copies() {}

// Products of 16 x 8 and 8 x 8, and of 16 x 16 and 16 x 8, with their operands where the instructions have them, see
// streamkernels/mma.cuh.
template <typename Element>
void multiply_add(float (&sum)[4], const uint32_t (&a)[2], uint32_t b) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    // of the rows `row` and `row` + 8, and of two columns
    const uint32_t upper = __shfl_sync(0, a[0], 4 * row + i), lower = __shfl_sync(0, a[1], 4 * row + i);
    const uint32_t left = __shfl_sync(0, b, 4 * column + i), right = __shfl_sync(0, b, 4 * (column + 1) + i);
    const uint32_t rows[2] = {upper, lower}, columns[2] = {left, right};
    for (int y = 0; y < 2; ++y) {
      for (int x = 0; x < 2; ++x) {
        Element r[2], c[2];
        std::memcpy(r, &rows[y], 4);
        std::memcpy(c, &columns[x], 4);
        for (int e = 0; e < 2; ++e) sum[2 * y + x] += to_float(r[e]) * to_float(c[e]);
      }
    }
  }
}
template <typename Element>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add<Element>(sum, {a[0], a[1]}, b0);
  multiply_add<Element>(sum, {a[2], a[3]}, b1);
}

}  // namespace sk
