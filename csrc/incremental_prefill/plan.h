// Which keys a session's rows need, and how the tiles of all sessions are cut into equal shares: plain integer
// arithmetic, on the device from device lengths, tested on the host.
#pragma once

#include <climits>
#include <cstdint>

#include "incremental_prefill/params.h"
#include "streamkernels/roles.cuh"
#include "streamkernels/slots.cuh"

namespace sk::incremental_prefill {

SK_HOST_DEVICE constexpr int least(int a, int b) {
  return a < b ? a : b;
}
SK_HOST_DEVICE constexpr int most(int a, int b) {
  return a > b ? a : b;
}
SK_HOST_DEVICE constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

SK_HOST_DEVICE float reciprocal(int b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.f, static_cast<float>(b));
#else
  return 1.f / static_cast<float>(b);
#endif
}
// a / b for 0 <= a, 0 < b and a quotient below 2^20: a fraction of what an exact division costs. `by_b`: reciprocal(b).
SK_HOST_DEVICE int divide(int a, int b, float by_b) {
#if defined(__CUDA_ARCH__)
  int q = static_cast<int>(static_cast<float>(a) * by_b);
  const int rest = a - q * b;
  q += rest >= b ? 1 : rest < 0 ? -1 : 0;
  return q;
#else
  return a / b;
#endif
}
SK_HOST_DEVICE int divide(int a, int b) {
  return divide(a, b, reciprocal(b));
}

// What the rows of one session ask for, as sums, minima and maxima: what a group of threads can reduce.
struct Census {
  int rows[2];               // source and target rows
  int begin[2];              // smallest begin of either segment
  int limit_min, limit_max;  // of target rows
};

SK_HOST_DEVICE Census no_rows() {
  return {{0, 0}, {INT_MAX, INT_MAX}, INT_MAX, INT_MIN};
}
SK_HOST_DEVICE void count_row(Census& c, int role, int source_begin, int target_begin, int limit) {
  if (role != kSource && role != kTarget) return;
  c.rows[0] += role == kSource;
  c.rows[1] += role == kTarget;
  c.begin[0] = least(c.begin[0], source_begin);
  if (role == kTarget) {
    c.begin[1] = least(c.begin[1], target_begin);
    c.limit_min = least(c.limit_min, limit);
    c.limit_max = most(c.limit_max, limit);
  }
}

// The part of a segment that a call can see: stream indices [lowest, end) and [0, sinks), of which [0, held) lie in the
// cache already and the others are the call's own.
struct View {
  int length;  // committed, as the device says it
  int total;   // with the call's rows
  int held, lowest, end, sinks;
};

SK_HOST_DEVICE View view_of(const Segment& s, int ring_sinks, int length, int rows) {
  View view;
#if defined(__CUDA_ARCH__)
  // worked out again for each session, or it would be kept in registers that the products need
  asm volatile("" : "+r"(ring_sinks));
#endif
  // garbage stays far from overflow
  view.length = least(most(length, -kMaxRows), INT_MAX - 2 * kMaxRows);
  view.total = view.length + rows;
  const bool ring = s.window > 0;
  const int kept = s.capacity - ring_sinks;
  view.end = ring ? most(view.total, 0) : least(most(view.total, 0), s.capacity);
  view.held = least(most(view.length, 0), view.end);
  // a ring holds its sinks and the last `kept` keys
  view.lowest = ring ? most(0, least(view.total, view.total - kept)) : 0;
  view.sinks = ring ? most(s.sinks, ring_sinks) : s.sinks;
  if (view.lowest > 0) view.sinks = least(view.sinks, ring_sinks);
  if (ring && kept <= 0) view.end = view.held = least(view.end, s.capacity);
  return view;
}

// What one row sees of a segment: [begin, end) and [0, sinks) up to the same end.
struct Sight {
  int begin, end;
};

// `own`: the row's own stream index.
SK_HOST_DEVICE Sight sight_of(const View& view, int window, int begin, int end) {
  const int first = window > 0 ? most(begin, end - window) : begin;
  return {most(first, view.lowest), least(end, view.end)};
}
SK_HOST_DEVICE Sight source_sight(const View& view, int window, int role, int own, int begin, int limit) {
  if (role == kSource) return sight_of(view, window, begin, most(own + 1, 0));
  return sight_of(view, window, begin, role == kTarget ? least(most(limit, 0), most(view.total, 0)) : 0);
}
SK_HOST_DEVICE Sight target_sight(const View& view, int window, int role, int own, int begin) {
  return sight_of(view, window, begin, role == kTarget ? most(own + 1, 0) : 0);
}
SK_HOST_DEVICE bool sees(Sight sight, int sinks, int index) {
  return index < sight.end && (index >= sight.begin || index < sinks);
}

// The tiles of one segment that hold keys some row may see: [0, sinks), then [first, first + tiles).
struct Tiles {
  int sinks, first, tiles;

  SK_HOST_DEVICE int count() const { return sinks + tiles; }
  SK_HOST_DEVICE int at(int i) const { return i < sinks ? i : first + i - sinks; }
};

// `end`: the keys that some row sees end here; `lowest_end`: the smallest end of a row.
SK_HOST_DEVICE Tiles tiles_of(const View& view, int window, int begin, int end, int lowest_end, int keys) {
  end = least(end, view.held);
  begin = most(most(begin, window > 0 ? lowest_end - window : 0), view.lowest);
  Tiles t{0, 0, 0};
  if (end <= 0) return t;
  const int last = ceil_div(end, keys);
  t.sinks = least(ceil_div(least(view.sinks, end), keys), last);
  t.first = most(begin / keys, t.sinks);
  t.tiles = begin < end ? most(last - t.first, 0) : 0;
  return t;
}

// All that rows of a session attend to, in tiles: old source keys, old target keys. The call's own keys come first.
struct Session {
  View views[2];
  Tiles tiles[2];

  SK_HOST_DEVICE int old() const { return tiles[0].count() + tiles[1].count(); }
};

SK_HOST_DEVICE Session session_of(const Params& p, const Census& c, int source_length, int target_length, int keys) {
  Session s;
  s.views[0] = view_of(p.segments[0], p.ring_sinks, source_length, c.rows[0]);
  s.views[1] = view_of(p.segments[1], p.ring_sinks, target_length, c.rows[1]);
  const View &source = s.views[0], &target = s.views[1];
  int end = 0, lowest_end = INT_MAX;
  if (c.rows[0] > 0) {
    end = source.held;
    lowest_end = most(source.length + 1, 0);
  }
  if (c.rows[1] > 0) {
    end = most(end, least(most(c.limit_max, 0), most(source.total, 0)));
    lowest_end = least(lowest_end, least(most(c.limit_min, 0), most(source.total, 0)));
  }
  s.tiles[0] = tiles_of(source, p.segments[0].window, c.begin[0], end, lowest_end, keys);
  const int reach = c.rows[1] > 0 ? target.held : 0;
  s.tiles[1] = tiles_of(target, p.segments[1].window, c.begin[1], reach, most(target.length + 1, 0), keys);
  return s;
}

// The same for the rows of a session that all see every key before them, which takes a fraction of the arithmetic: all
// `rows` belong to `segment`, nothing is bounded.
SK_HOST_DEVICE Session plain_session(const Params& p, int segment, int rows, const int (&length)[2], int keys) {
  Session s;
  for (int i = 0; i < 2; ++i) {
    View& view = s.views[i];
    view.length = least(most(length[i], -kMaxRows), INT_MAX - 2 * kMaxRows);
    view.total = view.length + (segment == i ? rows : 0);
    view.end = least(most(view.total, 0), p.segments[i].capacity);
    view.held = least(most(view.length, 0), view.end);
    view.lowest = 0;
    view.sinks = p.segments[i].sinks;
    s.tiles[i] = {0, 0, i == kSource || segment == kTarget ? ceil_div(view.held, keys) : 0};
  }
  return s;
}

// A few new rows ride along with the first old tile; many count as tiles of their own.
SK_HOST_DEVICE int counted_fresh(int T, int keys) {
  return T <= 32 ? 0 : ceil_div(T, keys);
}
SK_HOST_DEVICE int steps_of(const Session& s, int T, int keys) {
  return most(1, s.old() + counted_fresh(T, keys));
}

// Steps of all items one after another, cut into shares of equal length, one per worker.
struct Shares {
  int per_item;  // steps of an item, rounded up so that whole shares fit, when all items are alike; else 0
  int share;     // steps of a worker
};

// 2^smallest steps are worth a worker.
SK_HOST_DEVICE int uneven_share(int total, int workers, int smallest) {
  return total <= 0 ? 1 : divide(total - 1, most(1, least(workers, total >> smallest))) + 1;
}
// Items alike, each of `steps`: cut so that a share never straddles two items, as beginning and ending an item takes a
// block as long as a few steps, unless that leaves workers of `blocks` idle for longer.
constexpr int kStraddling = 4;  // steps of a block
SK_HOST_DEVICE Shares even_shares(int items, int steps, int workers, int each, int smallest, int blocks) {
  const int uneven = uneven_share(items * steps, workers, smallest);
  if (each == 0) return {0, uneven};
  const int share = divide(steps - 1, most(1, least(each, steps >> smallest))) + 1;
  if (share > uneven + kStraddling * blocks) return {0, uneven};
  return {(divide(steps - 1, share) + 1) * share, share};
}

// Part `i` of 2^log of the range [begin, end).
struct Range {
  int begin, end;
};
SK_HOST_DEVICE Range part_of(Range whole, int i, int log) {
  // at most 8 parts of far fewer than 2^28 steps
  const uint32_t size = whole.end - whole.begin, at = i;
  return {whole.begin + static_cast<int>(size * at >> log), whole.begin + static_cast<int>(size * (at + 1) >> log)};
}

// The same where part 0 has the call's new rows besides, which take it as long as kFresh steps.
constexpr int kFresh = 2;
SK_HOST_DEVICE Range beside_fresh(Range whole, int i, int log) {
  const int size = whole.end - whole.begin, others = (1 << log) - 1;
  const int first = most(0, size - kFresh * others) >> log, rest = size - first;
  if (i == 0) return {whole.begin, whole.begin + first};
  const int begin = whole.begin + first;
  return {begin + divide(rest * (i - 1), others), begin + divide(rest * i, others)};
}

// Part `i` of `n` of the same, where part 0 has one step besides if `fresh`.
SK_HOST_DEVICE Range cut(Range whole, int i, int n, float by_n, bool fresh) {
  const int size = whole.end - whole.begin + fresh;
  const int begin = divide(size * i, n, by_n), end = divide(size * (i + 1), n, by_n);
  return {whole.begin + most(begin - fresh, 0), whole.begin + most(end - fresh, 0)};
}

}  // namespace sk::incremental_prefill
