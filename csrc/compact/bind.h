// compact at the border to Python.
#pragma once

#include "compact/params.h"
#include "streamkernels/border.h"

namespace sk::compact {

inline void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "compact",
      [](uintptr_t x, int64_t batch, int64_t outer, int64_t token, int64_t inner, int64_t column, uintptr_t y,
         Table index, Table count, int B, int O, int S, int I, int C, int K, int size, int device, uintptr_t stream) {
        border::require(B >= 0 && O >= 0 && S >= 0 && I >= 0 && C >= 0 && K >= 0, "compact: x: expected sizes >= 0");
        border::require(size == 1 || size == 2 || size == 4 || size == 8 || size == 16,
                        "compact: x: expected an element of 1, 2, 4, 8 or 16 bytes");
        const bool some = B && O && I && C && K;
        border::require(!some || (y && index.data && count.data && (x || S == 0)),
                        "compact: x: expected no null pointer");
        launch({border::address(x), batch, outer, token, inner, column, border::address(y), index, count, B, O, S, I, C,
                K},
               size, device, stream);
      },
      "x"_a, "batch"_a, "outer"_a, "token"_a, "inner"_a, "column"_a, "y"_a, "index"_a, "count"_a, "B"_a, "O"_a, "S"_a,
      "I"_a, "C"_a, "K"_a, "size"_a, "device"_a, "stream"_a);
}

}  // namespace sk::compact
