// select_tokens at the border to Python.
#pragma once

#include "select_tokens/params.h"
#include "streamkernels/border.h"

namespace sk::select_tokens {

inline void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "select_tokens",
      [](Table scores, Table index, Table count, uintptr_t out, uintptr_t out_count, double threshold, bool thresholded,
         bool largest, int B, int K, int limit, int width, int dtype, int device, uintptr_t stream) {
        border::require(B >= 0 && K >= 0, "select_tokens: scores: expected sizes >= 0");
        border::require(limit >= 0 && limit <= width, "select_tokens: limit: expected 0 <= limit <= width");
        border::require(is_dtype(dtype), "select_tokens: scores: expected a dtype code of 0, 1 or 2");
        border::require(B == 0 || ((scores.data || K == 0) && (out || width == 0) && out_count),
                        "select_tokens: scores: expected no null pointer");
        launch({scores, index, count, static_cast<int32_t*>(border::address(out)),
                static_cast<int32_t*>(border::address(out_count)), static_cast<float>(threshold), thresholded, largest,
                B, K, limit, width},
               static_cast<DType>(dtype), device, stream);
      },
      "scores"_a, "index"_a, "count"_a, "out"_a, "out_count"_a, "threshold"_a, "thresholded"_a, "largest"_a, "B"_a,
      "K"_a, "limit"_a, "width"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace sk::select_tokens
