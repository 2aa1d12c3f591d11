// What one rotate launch needs, for a fresh tensor and in place. The arguments mean what the schemas of
// streamkernels::rotate and streamkernels::reanchor say.
#pragma once

#include <cstdint>

#include "streamkernels/tensor.h"

namespace sk::rotate {

struct Params {
  Rows x, y;           // [B, H, T, D]; y may be x
  Table cosine, sine;  // [B or 1, T or 1, rotary_dim / 2]; a row stride of 0 turns all rows alike
  int B, H, T;
  int D;  // columns to write: in place, those from rotary_dim on stay as they are and D is rotary_dim
  int rotary_dim;
  bool interleaved;
  bool angles_fp32;  // cos and sin are fp32, else of x's dtype
};

void launch(const Params& params, DType dtype, int device, uintptr_t stream);
void preload(int device);

}  // namespace sk::rotate
