// The rows of a call: whose they are, what each one sees, and how many steps their sessions take.
#pragma once

#include <cstdint>

#include "incremental_prefill/plan.h"

namespace sk::incremental_prefill {

constexpr int kNoKey = INT_MIN;  // of a row that is no key: padding, or garbage

// A new row's stream index, with its segment in the sign.
SK_HOST_DEVICE int key_code(int role, int index) {
  if ((role != kSource && role != kTarget) || index < 0) return kNoKey;
  return role == kSource ? index : ~index;
}
SK_HOST_DEVICE int segment_of(int code) {
  return code < 0 ? kTarget : kSource;
}
SK_HOST_DEVICE int index_of(int code) {
  return code < 0 ? ~code : code;
}

// What the threads of a block know of the session at hand.
struct Rows2 {
  int* code;     // [T] see key_code
  int4* sights;  // [T] (source begin, end, target begin, end); a source end of -1 marks a padding row
};

__device__ __forceinline__ int cell(const Column& c, int b, int t, int otherwise) {
  return c.data == nullptr ? otherwise : __ldg(c.data + b * c.batch + t * c.row);
}
__device__ __forceinline__ int role_at(const Params& p, int b, int t) {
  return p.role == nullptr ? p.segment : __ldg(p.role + b * p.role_batch + t * p.role_row);
}
__device__ __forceinline__ int length_at(const Params& p, int b, int segment) {
  return __ldg(p.length + b * p.length_batch + segment * p.length_segment);
}

// Over groups of `group` lanes.
__device__ __forceinline__ Census reduce_census(Census c, int group) {
#pragma unroll 1
  for (int step = group / 2; step > 0; step /= 2) {
    c.rows[0] += __shfl_xor_sync(~0u, c.rows[0], step);
    c.rows[1] += __shfl_xor_sync(~0u, c.rows[1], step);
    c.begin[0] = least(c.begin[0], __shfl_xor_sync(~0u, c.begin[0], step));
    c.begin[1] = least(c.begin[1], __shfl_xor_sync(~0u, c.begin[1], step));
    c.limit_min = least(c.limit_min, __shfl_xor_sync(~0u, c.limit_min, step));
    c.limit_max = most(c.limit_max, __shfl_xor_sync(~0u, c.limit_max, step));
  }
  return c;
}
// Over the whole warp.
__device__ __forceinline__ Census reduce_census(const Census& c) {
  return {{__reduce_add_sync(~0u, c.rows[0]), __reduce_add_sync(~0u, c.rows[1])},
          {__reduce_min_sync(~0u, c.begin[0]), __reduce_min_sync(~0u, c.begin[1])},
          __reduce_min_sync(~0u, c.limit_min),
          __reduce_max_sync(~0u, c.limit_max)};
}

// Whether nothing but the number of rows matters, and the census of every session then.
__device__ __forceinline__ bool counts_alone(const Params& p) {
  return p.role == nullptr && p.limit.data == nullptr && p.segments[0].begin.data == nullptr &&
         p.segments[1].begin.data == nullptr;
}
__device__ __forceinline__ Census plain_census(const Params& p) {
  return {{p.segment == kSource ? p.T : 0, p.segment == kTarget ? p.T : 0}, {0, 0}, INT_MAX, INT_MAX};
}

// Fills prefix[0 .. B] with the steps of the sessions before each one, over all their items, each of which counts
// `begin` more. Ends in a barrier.
template <class S>
__device__ __forceinline__ void plan_sessions(const Params& p, int items_each, int begin, int* prefix) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int group = 1;
  while (!counts_alone(p) && group < 32 && group < p.T) group *= 2;
  // a group of lanes per session
  for (int base = 0; base < p.B; base += S::kThreads / group) {
    const int b = base + thread / group;
    const int safe = b < p.B ? b : p.B - 1;
    Census c = no_rows();
    if (counts_alone(p)) {
      c = plain_census(p);
    } else {
#pragma unroll 4
      for (int t = thread % group; t < p.T; t += group) {
        count_row(c, role_at(p, safe, t), cell(p.segments[0].begin, safe, t, 0), cell(p.segments[1].begin, safe, t, 0),
                  cell(p.limit, safe, t, INT_MAX));
      }
      c = reduce_census(c, group);
    }
    if (b < p.B && thread % group == 0) {
      const Session s = session_of(p, c, length_at(p, b, 0), length_at(p, b, 1), S::kKeys);
      prefix[b + 1] = (begin + steps_of(s, p.T, S::kKeys)) * items_each;
    }
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int base = 0; base < p.B; base += 32) {
      int n = base + lane < p.B ? prefix[base + lane + 1] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, n, step);
        if (lane >= step) n += other;
      }
      if (base + lane < p.B) prefix[base + lane + 1] = before + n;
      before += __shfl_sync(~0u, n, 31);
    }
    if (lane == 0) prefix[0] = 0;
  }
  __syncthreads();
}

// Reads the rows of session b: fills `rows` for all T of them, and in `out` what they attend to. Ends in a barrier.
template <class S>
__device__ __forceinline__ void read_session(const Params& p, int b, const Rows2& rows, int* scratch, Session& out) {
  constexpr int kWarps = S::kThreads / 32;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const unsigned earlier = (1u << lane) - 1;
  const int source_length = length_at(p, b, 0), target_length = length_at(p, b, 1);
  const bool simple = counts_alone(p);
  Census c = simple ? plain_census(p) : no_rows();
  int base[2] = {0, 0};
  for (int strip = 0; strip < p.T; strip += S::kThreads) {
    const int t = strip + thread;
    const bool mine = t < p.T;
    const int role = mine ? role_at(p, b, t) : -1;
    int rank = t;
    if (!simple) {
      const int source_begin = mine ? cell(p.segments[0].begin, b, t, 0) : 0;
      const int target_begin = mine ? cell(p.segments[1].begin, b, t, 0) : 0;
      const int limit = mine ? cell(p.limit, b, t, INT_MAX) : 0;
      count_row(c, role, source_begin, target_begin, limit);
      if (mine) rows.sights[t] = make_int4(source_begin, limit, target_begin, role);
    }
    if (p.role != nullptr) {
      const unsigned sources = __ballot_sync(~0u, role == kSource), targets = __ballot_sync(~0u, role == kTarget);
      if (lane == 0) {
        scratch[2 * warp] = __popc(sources);
        scratch[2 * warp + 1] = __popc(targets);
      }
      __syncthreads();
      int before[2] = {base[0], base[1]};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const int n0 = scratch[2 * w], n1 = scratch[2 * w + 1];
        before[0] += w < warp ? n0 : 0;
        before[1] += w < warp ? n1 : 0;
        base[0] += n0;
        base[1] += n1;
      }
      rank = role == kSource ? before[0] + __popc(sources & earlier) : before[1] + __popc(targets & earlier);
      __syncthreads();
    }
    if (mine) rows.code[t] = rank;
  }
  if (!simple) {
    c = reduce_census(c);
    if (lane == 0) {
      int* to = scratch + 6 * warp;
      to[0] = c.rows[0], to[1] = c.rows[1], to[2] = c.begin[0], to[3] = c.begin[1];
      to[4] = c.limit_min, to[5] = c.limit_max;
    }
    __syncthreads();
    c = no_rows();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int* from = scratch + 6 * w;
      c.rows[0] += from[0], c.rows[1] += from[1];
      c.begin[0] = least(c.begin[0], from[2]), c.begin[1] = least(c.begin[1], from[3]);
      c.limit_min = least(c.limit_min, from[4]), c.limit_max = most(c.limit_max, from[5]);
    }
  }
  const Session s = session_of(p, c, source_length, target_length, S::kKeys);
  for (int t = thread; t < p.T; t += S::kThreads) {
    const int4 raw = simple ? make_int4(0, INT_MAX, 0, p.segment) : rows.sights[t];
    const int role = raw.w;
    const int own = (role == kTarget ? s.views[1].length : s.views[0].length) + rows.code[t];
    const Sight source = source_sight(s.views[0], p.segments[0].window, role, own, raw.x, raw.y);
    const Sight target = target_sight(s.views[1], p.segments[1].window, role, own, raw.z);
    const bool padding = role != kSource && role != kTarget;
    rows.sights[t] = make_int4(source.begin, padding ? -1 : source.end, target.begin, target.end);
    rows.code[t] = key_code(role, own);
  }
  if (thread == 0) out = s;
  __syncthreads();
}

// The same for the only session of a call whose rows all see every key before them. Does not end in a barrier.
template <class S>
__device__ __forceinline__ Session read_plain_session(const Params& p, const int (&length)[2], const Rows2& rows) {
  const int segment = p.segment == kSource ? kSource : kTarget;
  const Session s = plain_session(p, segment, p.T, length, S::kKeys);
  const View &source = s.views[0], &target = s.views[1];
  for (int t = threadIdx.x; t < p.T; t += S::kThreads) {
    const int own = (segment == kTarget ? target.length : source.length) + t, behind = most(own + 1, 0);
    rows.sights[t] = segment == kTarget ? make_int4(0, source.end, 0, least(behind, target.end))
                                        : make_int4(0, least(behind, source.end), 0, 0);
    rows.code[t] = key_code(segment, own);
  }
  return s;
}

// Over the rows of a tile: where their sights begin and end, per segment. Padding rows do not count.
struct Hull {
  int begin_min[2], begin_max[2], end_min[2], end_max[2];
};

// Of rows that see all that the cache holds: no row sees less of an old tile.
__device__ __forceinline__ Hull hull_of_all(const Session& s) {
  const int target = s.tiles[1].tiles > 0 ? s.views[1].held : 0;
  return {{0, 0}, {0, 0}, {s.views[0].held, target}, {s.views[0].held, target}};
}

__device__ __forceinline__ Hull hull_of(const Rows2& rows, int first, int last) {
  Hull h{{INT_MAX, INT_MAX}, {0, 0}, {INT_MAX, INT_MAX}, {0, 0}};
  for (int t = first + static_cast<int>(threadIdx.x % 32); t <= last; t += 32) {
    const int4 s = rows.sights[t];
    if (s.y < 0) continue;
    h.begin_min[0] = least(h.begin_min[0], s.x), h.begin_max[0] = most(h.begin_max[0], s.x);
    h.begin_min[1] = least(h.begin_min[1], s.z), h.begin_max[1] = most(h.begin_max[1], s.z);
    h.end_min[0] = least(h.end_min[0], s.y), h.end_max[0] = most(h.end_max[0], s.y);
    h.end_min[1] = least(h.end_min[1], s.w), h.end_max[1] = most(h.end_max[1], s.w);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    h.begin_min[i] = __reduce_min_sync(~0u, h.begin_min[i]);
    h.begin_max[i] = __reduce_max_sync(~0u, h.begin_max[i]);
    h.end_min[i] = __reduce_min_sync(~0u, h.end_min[i]);
    h.end_max[i] = __reduce_max_sync(~0u, h.end_max[i]);
  }
  return h;
}

}  // namespace sk::incremental_prefill
