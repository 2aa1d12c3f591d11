// rotate: turn the rows of x by their own angles into y, or in place. Memory-bound: x is read once and y written once.
#pragma once

#include "rotate/params.h"
#include "rotate/plan.h"
#include "streamkernels/columns.cuh"

namespace sk::rotate {

// N columns in one access: 16 bytes, or one element where alignment or sizes do not allow that.
template <typename Element, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  // heads vary fastest: blocks that share angles run together
  const unsigned outer = blockIdx.x / plan.groups, group = blockIdx.x % plan.groups;
  const int b = outer / plan.tiles;
  const int row = threadIdx.x / plan.items;
  const int t = (outer % plan.tiles) * plan.rows + row;
  if (row >= plan.rows || t >= p.T) return;
  const int first = group * plan.heads, last = min(first + plan.heads, p.H);
  const Columns<N, INTERLEAVED> columns(threadIdx.x % plan.items, plan.items, p.D, p.rotary_dim);

  Angles<Element, N, INTERLEAVED> angles;
  angles.load(p.cosine.data, p.sine.data, b * p.cosine.batch + t * p.cosine.row, b * p.sine.batch + t * p.sine.row,
              p.angles_fp32, columns);
  for (int h = first; h < last; h += kHeadsInFlight) {
    Chunk<Element, N> a[kHeadsInFlight], c[kHeadsInFlight];
#pragma unroll
    for (int u = 0; u < kHeadsInFlight; ++u) {
      if (h + u >= last) break;
      const Element* from = at<Element>(p.x, b, h + u, t);
      a[u].load_streaming(from + columns.a);
      if (columns.b >= 0) c[u].load_streaming(from + columns.b);
    }
#pragma unroll
    for (int u = 0; u < kHeadsInFlight; ++u) {
      if (h + u >= last) break;
      Element* to = at<Element>(p.y, b, h + u, t);
      turn(a[u], c[u], columns, angles);
      a[u].store(to + columns.a);
      if (columns.b >= 0) c[u].store(to + columns.b);
    }
  }
}

}  // namespace sk::rotate
