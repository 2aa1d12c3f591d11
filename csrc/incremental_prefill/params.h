// What one incremental_prefill launch needs. The arguments mean what streamkernels::incremental_prefill's schema says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::incremental_prefill {

constexpr int kMaxRows = 512;       // T
constexpr int kMaxSessions = 1024;  // B

// int32 [B, T] with strides in elements, or null
struct Column {
  const int32_t* data;
  int64_t batch, row;
};

// one segment of the cache: k, v [B, HK, capacity, D]
struct Segment {
  Rows k, v;
  Column begin;  // first stream index that a row sees; null: 0
  int capacity;
  int sinks;   // keys [0, sinks) are seen besides
  int window;  // > 0: a ring behind `ring_sinks` slots, and rows see at most that many keys before their end
};

struct Params {
  Rows q;              // [B, H, T, D]
  Rows k, v;           // [B, HK, T, D]
  Table cosine, sine;  // [B or 1, T, rotary_dim / 2]; not read when rotary_dim is 0
  Segment segments[2];
  const int32_t* length;  // [B, 2] committed rows of source and target
  int64_t length_batch, length_segment;
  int32_t* status;     // [1] bit `segment` is set when a row of it had no room
  const int8_t* role;  // [B, T], or null: every row belongs to `segment`
  int64_t role_batch, role_row;
  Column limit;             // how many source rows a target row sees; null: all
  const void* sink_logits;  // [H], or null
  void* o;                  // [B, T, H, D], contiguous
  float* lse;               // [B, H, T], contiguous
  uint32_t* counters;       // zero before every launch, and after it
  float* partials;          // uninitialised

  int B, H, HK, T, D;
  int rotary_dim;  // 0: q and k are already rotated
  int segment;
  int ring_sinks;
  float scale;
  float softcap;  // 0: none
  bool interleaved;
  bool angles_fp32;       // cos and sin are fp32, else of q's dtype
  bool sink_logits_fp32;  // else of q's dtype
};

// What a launch needs besides its arguments; large enough for every length. Launches that may run at the same time must
// not share it.
struct Workspace {
  size_t counters;  // of 4 bytes
  size_t partials;  // bytes
};

// Null when `params` can run on `device`, else one sentence why not (alignment, shared memory).
const char* refusal(const Params& params, DType dtype, int device);
// Depends on B, H, HK, T and D alone.
Workspace workspace(const Params& params, DType dtype, int device);
// Runs on `stream` of `device`. Throws CudaError when the launch fails.
void launch(const Params& params, DType dtype, int device, uintptr_t stream);
// Loads every instance of the kernel onto `device`, so that no later launch (or graph capture) has to.
void preload(int device);

}  // namespace sk::incremental_prefill
