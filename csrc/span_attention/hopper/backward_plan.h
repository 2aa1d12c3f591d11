// What the two launches of a backward are told: plain arithmetic over sizes.
#pragma once

#include "span_attention/hopper/backward.h"
#include "span_attention/hopper/dkdv/shape.cuh"
#include "span_attention/hopper/plan.h"

namespace sk::span_attention::hopper {

constexpr int kWaves = 2;  // of items: fewer, and the query heads of a key head are cut into parts that are joined

// How dk and dv are cut into items.
struct Cut {
  int tiles, parts, each, TB;

  Cut(int B, int H, int HK, int T, int S, int processors) : tiles((S + 127) / 128), TB((T + 63) / 64) {
    const int group = H / HK;
    const int64_t whole = std::max<int64_t>(1, int64_t{B} * HK * tiles), wanted = kWaves * processors;
    parts = static_cast<int>(std::clamp<int64_t>((wanted + whole - 1) / whole, 1, group));
    each = (group + parts - 1) / parts;
    parts = (group + each - 1) / each;
  }
};

inline int64_t statistics_of(int B, int H, int TB) {
  return int64_t{B} * H * TB * 64 * 2;  // floats; a multiple of four
}

inline Work work_of(const Cut& cut, int B, int H, int HK, int D) {
  const int64_t tiles = int64_t{B} * HK * cut.tiles;
  const int64_t partials = cut.parts > 1 ? tiles * cut.parts * 2 * 128 * D : 0;
  return {statistics_of(B, H, cut.TB) + partials, tiles};
}

inline dq::Inputs inputs_of(const Backward& x, const Cut& cut) {
  return {x.o.data,
          x.dout.data,
          x.o.batch,
          x.o.head,
          x.o.row,
          x.dout.batch,
          x.dout.head,
          x.dout.row,
          x.p.lse,
          x.dlse,
          reinterpret_cast<dq::Statistics*>(x.work),
          x.sink_gradient,
          static_cast<float>(x.p.scale),
          64 * cut.TB};
}

inline dkdv::Call call_of(const Backward& x, const Cut& cut) {
  const Params& p = x.p;
  dkdv::Call d{};
  d.bounds = reinterpret_cast<const int2*>(p.bounds);
  d.row_blocks = reinterpret_cast<const int4*>(x.row_blocks),
  d.key_blocks = reinterpret_cast<const int4*>(x.key_blocks);
  d.statistics = reinterpret_cast<dq::Statistics*>(x.work);
  d.partials = reinterpret_cast<float4*>(x.work + statistics_of(p.B, p.H, cut.TB));
  d.tickets = x.tickets, d.counters = x.counters;
  d.H = p.H, d.HK = p.HK, d.T = p.T, d.S = p.S, d.N = p.N, d.TB = cut.TB, d.SB = (p.S + 63) / 64;
  d.tiles = cut.tiles, d.parts = cut.parts, d.each = cut.each;
  const int64_t items = int64_t{p.B} * p.HK * cut.tiles * cut.parts;
  if (items > INT32_MAX / 2) throw std::invalid_argument("span_attention: k: too many keys for one launch");
  d.items = static_cast<int>(items);
  const int key_heads = p.B * p.HK, group = p.H / p.HK;
  d.together = static_cast<int>(std::clamp<int64_t>(kTogether / (int64_t{4} * p.T * p.D * group), 1, key_heads));
  while (key_heads % d.together != 0) --d.together;
  d.scale = static_cast<float>(p.scale) * kLog2E, d.factor = static_cast<float>(p.scale);
  return d;
}

}  // namespace sk::span_attention::hopper
