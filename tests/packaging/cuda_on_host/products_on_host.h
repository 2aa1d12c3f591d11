// On the host: what streamkernels/mma.cuh and streamkernels/async.cuh do with PTX. A copy is there at once.
#pragma once

#include <cmath>
#include <cstring>
#include <numeric>

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

// A row and a column of 16 numbers each, multiplied and added to `sum` as Hopper's tensor cores do: the terms are cut
// off two bits behind the last place of the one with the largest exponent, and what their sum has beyond a float is cut
// off.
template <typename Element>
float cut_sum(const Element (&row)[16], const Element (&column)[16], float sum) {
  double terms[17], most = -1e9;
  for (int e = 0; e < 17; ++e) {
    const double x = e < 16 ? to_float(row[e]) : sum, y = e < 16 ? to_float(column[e]) : 1.0;
    terms[e] = x * y;
    if (!std::isfinite(terms[e])) return static_cast<float>(std::accumulate(terms, terms + e + 1, 0.0));
    if (terms[e] != 0.0) most = std::max(most, std::logb(x) + std::logb(y));
  }
  const int place = static_cast<int>(most) - 25;
  double total = 0.0;
  for (const double term : terms) total += term == 0.0 ? 0.0 : std::ldexp(std::trunc(std::ldexp(term, -place)), place);
  const float nearest = static_cast<float>(total);
  return std::abs(static_cast<double>(nearest)) > std::abs(total) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Products of 16 x 16 and 16 x 8, with their operands where the instruction has them, see streamkernels/mma.cuh.
template <typename Element>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = lane % 4 * 2;
  // of the rows `row` and `row` + 8, and of two columns
  Element rows[2][16], columns[2][16];
  const auto fetch = [](Element* to, uint32_t x, int from) {
    const uint32_t bits = __shfl_sync(0, x, from);
    std::memcpy(to, &bits, sizeof(bits));
  };
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      for (int y = 0; y < 2; ++y) fetch(&rows[y][8 * half + 2 * i], a[2 * half + y], 4 * row + i);
      for (int x = 0; x < 2; ++x) fetch(&columns[x][8 * half + 2 * i], half ? b1 : b0, 4 * (column + x) + i);
    }
  }
  for (int i = 0; i < 4; ++i) sum[i] = cut_sum(rows[i / 2], columns[i % 2], sum[i]);
}

}  // namespace sk
