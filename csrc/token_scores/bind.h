// token_scores at the border to Python.
#pragma once

#include "streamkernels/border.h"
#include "token_scores/params.h"

namespace sk::token_scores {

inline void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "token_scores",
      [](Table q, Table o, Rows k, Rows v, Table lse, Table index, Table count, uintptr_t cosine, uintptr_t norm,
         uintptr_t mass, int B, int H, int HK, int S, int D, int K, double scale, double softcap, int dtype, int device,
         uintptr_t stream) {
        border::require(B >= 0 && HK >= 1 && S >= 0 && K >= 0 && H % HK == 0,
                        "token_scores: q: expected sizes >= 0 and H a multiple of HK");
        border::require(D % 8 == 0 && D >= 8 && D <= 256,
                        "token_scores: q: expected a head dim D that is a multiple of 8, at most 256");
        border::require(is_dtype(dtype), "token_scores: q: expected a dtype code of 0, 1 or 2");
        border::require(B == 0 || K == 0 ||
                            (q.data && o.data && lse.data && index.data && count.data && cosine && norm && mass &&
                             (S == 0 || (k.data && v.data))),
                        "token_scores: q: expected no null pointer");
        launch({q, o, k, v, lse, index, count, static_cast<float*>(border::address(cosine)),
                static_cast<float*>(border::address(norm)), static_cast<float*>(border::address(mass)), B, H, HK, S, D,
                K, static_cast<float>(scale), static_cast<float>(softcap)},
               static_cast<DType>(dtype), device, stream);
      },
      "q"_a, "o"_a, "k"_a, "v"_a, "lse"_a, "index"_a, "count"_a, "cosine"_a, "norm"_a, "mass"_a, "B"_a, "H"_a, "HK"_a,
      "S"_a, "D"_a, "K"_a, "scale"_a, "softcap"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace sk::token_scores
