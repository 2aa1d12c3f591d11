// The table of tiles. 16 rows: a decode step; the warps share out the keys. 64 and 128 rows: longer chunks; without 128
// for D = 96 and 256, where they are a tenth of the library's size and auto takes Triton's kernel for nearly all calls.
#pragma once

#include "incremental_prefill/instance.h"
#include "incremental_prefill/kernel.cuh"

namespace sk::incremental_prefill {

template <class S>
constexpr Instance instance_of() {
  return {
      incremental_prefill_kernel<S>, S::kRows,        S::kKeys, S::kThreads, S::kQuery, S::kStage, S::kWarpsS * S::kOut,
      Partial<S>::kFloats,           Header<S>::bytes};
}

template <typename Element, int D>
constexpr Instance last_instance() {
  if constexpr (D == 64 || D == 128) {
    return instance_of<Shape<Element, D, 8, 1, 64>>();
  } else {
    return {};
  }
}

template <typename Element, int D>
const Instance* instances() {
  constexpr bool kLarge = D > 128;
  static const Instance all[kInstances] = {
      instance_of<Shape<Element, D, 1, kLarge ? 4 : 8, kLarge ? 64 : 128>>(),
      instance_of<Shape<Element, D, 4, 2, kLarge ? 64 : 128>>(),
      last_instance<Element, D>(),
  };
  return all;
}

}  // namespace sk::incremental_prefill
