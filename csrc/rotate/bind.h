// rotate at the border to Python.
#pragma once

#include "rotate/params.h"
#include "streamkernels/border.h"

namespace sk::rotate {

inline void check(const Params& p, int dtype, int angles_dtype) {
  border::require(p.B >= 0 && p.H >= 0 && p.T >= 0, "rotate: x: expected sizes >= 0");
  border::require(p.D >= 2 && p.D <= 256, "rotate: x: expected a head dim D of at most 256");
  border::require(p.rotary_dim % 2 == 0 && p.rotary_dim >= 2 && p.rotary_dim <= p.D,
                  "rotate: cos: expected an even rotary_dim in [2, D]");
  border::require(is_dtype(dtype), "rotate: x: expected a dtype code of 0, 1 or 2");
  border::require(angles_dtype == dtype || angles_dtype == static_cast<int>(DType::kFloat32),
                  "rotate: cos: expected float32 or x's dtype");
  border::require(p.B == 0 || p.H == 0 || p.T == 0 || (p.x.data && p.y.data && p.cosine.data && p.sine.data),
                  "rotate: x: expected no null pointer");
}

inline void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "rotate",
      [](Rows x, Rows y, Table cosine, Table sine, int B, int H, int T, int D, int rotary_dim, bool interleaved,
         int dtype, int angles_dtype, int device, uintptr_t stream) {
        const bool fp32 = angles_dtype == static_cast<int>(DType::kFloat32);
        const Params p{x, y, cosine, sine, B, H, T, D, rotary_dim, interleaved, fp32};
        check(p, dtype, angles_dtype);
        launch(p, static_cast<DType>(dtype), device, stream);
      },
      "x"_a, "y"_a, "cos"_a, "sin"_a, "B"_a, "H"_a, "T"_a, "D"_a, "rotary_dim"_a, "interleaved"_a, "dtype"_a,
      "angles_dtype"_a, "device"_a, "stream"_a);
}

}  // namespace sk::rotate
