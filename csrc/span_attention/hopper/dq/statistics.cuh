// The rows' statistics, made by the warps that neither fetch nor multiply.
#pragma once

#include "span_attention/hopper/dq/shape.cuh"
#include "span_attention/hopper/load.cuh"

namespace sk::span_attention::hopper::dq {

// Of a row whose do . o is `along`; `lse` in units of e. A sink logit joins the denominator; what the row adds to its
// gradient is the third number (reference/attend_rows.py has the equations).
struct Row {
  Statistics statistics;
  float sink;
};
__device__ __forceinline__ Row row_of(float along, float lse, float dlse, bool has_sink, float sink) {
  // whoever sees nothing weighs nothing, whatever its gradients are
  if (lse == -INFINITY) return {{INFINITY, 0.f}, 0.f};
  if (!has_sink) return {{lse * kLog2E, along - dlse}, 0.f};
  const float top = fmaxf(lse, sink), whole = top + logf(__expf(lse - top) + __expf(sink - top));
  return {{whole * kLog2E, along - dlse * __expf(fminf(whole - lse, 80.f))}, -__expf(sink - whole) * along};
}

// Half a warp has a row at a time.
template <class S>
struct Statistician {
  using Element = typename S::Element;
  const Call& c;
  const Inputs& in;
  Room<S> room;
  Ring<S::kItems> place;
  static constexpr int kLanes = S::D / 8;  // of a row: 16 bytes each
  static constexpr int kAtOnce = 32 / kLanes;

  static __device__ __forceinline__ float product(const uint4& a, const uint4& b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low[2], high[2];
      unpack<Element>(x[i], low[0], high[0]);
      unpack<Element>(y[i], low[1], high[1]);
      sum += low[0] * low[1] + high[0] * high[1];
    }
    return sum;
  }

  __device__ __forceinline__ void run(int warp) {
    const int lane = threadIdx.x % 32, chunk = lane % kLanes;
    for (;;) {
      barrier_wait(room.item_known(place.at), place.phase);
      const Item item = room.item(place.at);
      if (item.head < 0) {
        if (lane == 0) barrier_arrive(room.item_full(place.at));
        return;
      }
      const int b = item.head / c.H, h = item.head - b * c.H;
      const auto* o = static_cast<const Element*>(in.o) + b * in.o_b + h * in.o_h + chunk * 8;
      const auto* dout = static_cast<const Element*>(in.dout) + b * in.do_b + h * in.do_h + chunk * 8;
      Statistics* const to = room.statistics(place.at);
      const bool has_sink = c.sink_logits != nullptr;
      const float sink = has_sink ? sink_logit<Element>(c, h) : 0.f;
#pragma unroll 2
      for (int r = warp * kAtOnce + lane / kLanes; r < S::kRows; r += kStatWarps * kAtOnce) {
        const int t = item.block * S::kRows + r;
        const bool real = t < c.T;
        float along = 0.f, lse = -INFINITY, dlse = 0.f;
        const int64_t row = int64_t{item.head} * c.T + t;
        if (real) {
          along = product(__ldg(reinterpret_cast<const uint4*>(o + t * in.o_t)),
                          __ldg(reinterpret_cast<const uint4*>(dout + t * in.do_t)));
          lse = __ldg(in.lse + row);
          if (in.dlse != nullptr) dlse = __ldg(in.dlse + row);
        }
#pragma unroll
        for (int n = kLanes / 2; n > 0; n /= 2) along += __shfl_xor_sync(~0u, along, n);
        const Row x = row_of(along, lse, dlse, has_sink, sink);
        if (chunk == 0) {
          to[r] = x.statistics;
          if (t < in.rows) in.statistics[int64_t{item.head} * in.rows + t] = x.statistics;
          if (real && has_sink) in.sink_gradient[row] = x.sink;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(room.item_full(place.at));
      place.advance();
    }
  }
};

}  // namespace sk::span_attention::hopper::dq
