// reanchor at the border to Python: rotate's kernel, in place and on the rotated columns alone.
#pragma once

#include "rotate/bind.h"

namespace sk::reanchor {

inline void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "reanchor",
      [](Rows x, Table cosine, Table sine, int B, int HK, int S, int rotary_dim, bool interleaved, int dtype,
         int angles_dtype, int device, uintptr_t stream) {
        const bool fp32 = angles_dtype == static_cast<int>(DType::kFloat32);
        const rotate::Params p{x, x, cosine, sine, B, HK, S, rotary_dim, rotary_dim, interleaved, fp32};
        rotate::check(p, dtype, angles_dtype);
        rotate::launch(p, static_cast<DType>(dtype), device, stream);
      },
      "x"_a, "cos"_a, "sin"_a, "B"_a, "HK"_a, "S"_a, "rotary_dim"_a, "interleaved"_a, "dtype"_a, "angles_dtype"_a,
      "device"_a, "stream"_a);
}

}  // namespace sk::reanchor
