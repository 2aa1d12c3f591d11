// How one compact launch is cut into blocks: plain arithmetic, tested on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "compact/params.h"

namespace sk::compact {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // rows whose loads are issued together

// A block gathers rows [tile * rows, +rows) of the K * I rows of one sample and outer index, `lanes` threads a row.
struct Plan {
  int lanes;  // threads per row, a power of two
  int rows;   // of a block
  int64_t tiles, blocks;
};

// Bytes that one access moves: the widest of 16, 8, 4, 2, 1 that every row of x is aligned to. With an innermost stride
// it is one element.
inline int unit_of(const Params& p, int size) {
  if (p.C > 1 && p.column != 1) return size;
  int64_t bits = static_cast<int64_t>(p.C) * size | 16;
  bits |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y));
  const auto stride = [&](int length, int64_t elements) { bits |= length > 1 ? elements * size : 0; };
  stride(p.B, p.batch);
  stride(p.O, p.outer);
  stride(p.S, p.token);
  stride(p.I, p.inner);
  return static_cast<int>(bits & -bits);
}

// `p` with strides and C counted in units.
inline Params in_units(Params p, int size, int unit) {
  const int elements = unit / size;
  p.batch /= elements;
  p.outer /= elements;
  p.token /= elements;
  p.inner /= elements;
  p.C /= elements;
  return p;
}

inline Plan make_plan(const Params& p) {
  Plan plan{};
  plan.lanes = 1;
  while (plan.lanes < kThreads && plan.lanes < p.C) plan.lanes *= 2;
  const int64_t rows = static_cast<int64_t>(p.K) * p.I;
  plan.rows = kThreads / plan.lanes * kInFlight;
  plan.tiles = (rows + plan.rows - 1) / plan.rows;
  plan.blocks = plan.tiles * p.B * p.O;
  return plan;
}

}  // namespace sk::compact
