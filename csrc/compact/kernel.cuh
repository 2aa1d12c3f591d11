// compact: gather the listed rows of a tensor, zeros where nothing is listed. Memory-bound: what is listed is read
// once.
#pragma once

#include "compact/params.h"
#include "compact/plan.h"
#include "streamkernels/chunk.cuh"

namespace sk::compact {

// A unit of 16, 8, 4, 2 or 1 bytes, moved as bits: x may be of any dtype.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  const int64_t group = blockIdx.x / plan.tiles, tile = blockIdx.x % plan.tiles;
  const int64_t b = group / p.O, o = group % p.O;
  const int64_t rows = int64_t{p.K} * p.I;
  const Unit* x = static_cast<const Unit*>(p.x) + b * p.batch + o * p.outer;
  Unit* y = static_cast<Unit*>(p.y) + group * rows * p.C;
  const int32_t* index = static_cast<const int32_t*>(p.index.data) + b * p.index.batch;
  const int count = static_cast<const int32_t*>(p.count.data)[b * p.count.batch];
  const int lane = threadIdx.x % plan.lanes, step = kThreads / plan.lanes;
  const int64_t first = tile * plan.rows + threadIdx.x / plan.lanes;

  const Unit* from[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int64_t row = first + u * step;
    const int64_t k = p.I == 1 ? row : row / p.I;
    const int token = row < rows && k < count ? index[k * p.index.row] : -1;
    const bool listed = token >= 0 && token < p.S;
    from[u] = listed ? x + token * p.token + (row - k * p.I) * p.inner : nullptr;
  }
  for (int c = lane; c < p.C; c += plan.lanes) {
    Unit value[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      value[u] = Unit{};
      if (from[u] != nullptr) value[u] = __ldcs(from[u] + c * p.column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t row = first + u * step;
      if (row < rows) y[row * p.C + c] = value[u];
    }
  }
}

}  // namespace sk::compact
