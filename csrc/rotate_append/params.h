// What one rotate_append launch needs. The arguments mean what streamkernels::rotate_append's schema says.
#pragma once

#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::rotate_append {

struct Params {
  Rows k, v;                // [B, HK, T, D]
  Table cosine, sine;       // [B or 1, T, rotary_dim / 2]; not read when rotary_dim is 0
  Rows source_k, source_v;  // [B, HK, source_capacity, D], written
  Rows target_k, target_v;  // [B, HK, target_capacity, D], written
  const int32_t* length;    // [B, 2] committed rows of source and target
  int64_t length_batch, length_segment;
  int32_t* status;     // [1] bit `segment` is set when a row of it had no room
  const int8_t* role;  // [B, T], or null: every row belongs to `segment`
  int64_t role_batch, role_row;

  int B, HK, T, D;
  int rotary_dim;  // 0: k is already rotated
  int source_capacity, target_capacity;
  int segment;
  int sinks;
  bool bounded;
  bool interleaved;
  bool angles_fp32;  // cos and sin are fp32, else of k's dtype
};

// Appends on `stream` of `device`. Throws CudaError when the launch fails.
void launch(const Params& params, DType dtype, int device, uintptr_t stream);

// Loads every instance of the kernel onto `device`, so that no later launch (or graph capture) has to.
void preload(int device);

}  // namespace sk::rotate_append
