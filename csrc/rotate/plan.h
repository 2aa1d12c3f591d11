// How one rotate launch is cut into blocks: plain arithmetic, tested on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rotate/params.h"

namespace sk::rotate {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 10;  // blocks wanted: two waves
constexpr int kHeadsInFlight = 4;

// A block turns rows [tile * rows, +rows) of one batch row for heads [group * heads, +heads). A thread owns two runs of
// `width` columns (an item) of one row and walks over the heads.
struct Plan {
  int items;  // threads per row: ceil(D / width / 2)
  int rows;   // of a block
  int heads;  // of a block
  int tiles, groups;
  int64_t blocks;
};

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Columns that a thread moves with one access: 16 bytes when every access lies on its border, else one element.
inline int access_width(const Params& p, int element_size) {
  const int width = 16 / element_size;
  const int run = p.interleaved ? p.rotary_dim : p.rotary_dim / 2;
  const int angle_size = p.angles_fp32 ? 4 : element_size;
  const bool angles = aligned(p.cosine, angle_size) && aligned(p.sine, angle_size);
  const bool rows = aligned(p.x, element_size) && aligned(p.y, element_size);
  return p.D % width == 0 && run % width == 0 && angles && rows ? width : 1;
}

inline Plan make_plan(const Params& p, int width, int multiprocessors) {
  Plan plan{};
  plan.items = ceil_div(ceil_div(p.D, width), 2);
  plan.rows = std::min(p.T, std::max(1, kThreads / plan.items));
  plan.heads = p.H;
  plan.tiles = ceil_div(p.T, plan.rows);
  const auto blocks = [&] { return static_cast<int64_t>(p.B) * plan.tiles * ceil_div(p.H, plan.heads); };
  const int64_t wanted = static_cast<int64_t>(kBlocksPerSm) * multiprocessors;
  while (plan.heads > 1 && blocks() < wanted) plan.heads = ceil_div(plan.heads, 2);
  plan.groups = ceil_div(p.H, plan.heads);
  plan.blocks = blocks();
  return plan;
}

}  // namespace sk::rotate
