// The tiles of plain sessions: 64 rows, whose keys two warpgroups share out, and 128.
#pragma once

#include "incremental_prefill/plain/config.h"
#include "incremental_prefill/plain/kernel.cuh"

namespace sk::incremental_prefill {

template <class S>
constexpr PlainInstance plain_instance_of() {
  return {plain_prefill_kernel<S>, S::kRows,  S::kKeys, S::kThreads,
          S::kKeyGroups,           S::kStage, S::kRow,  Partial<S>::kFloats,
          PlainLayout<S>::kStages};
}

template <typename Element>
const PlainInstance* plain_instances(int D) {
  static const PlainInstance all[2][kPlainInstances] = {
      {plain_instance_of<PlainShape<Element, 64, 1>>(), plain_instance_of<PlainShape<Element, 64, 2>>()},
      {plain_instance_of<PlainShape<Element, 128, 1>>(), plain_instance_of<PlainShape<Element, 128, 2>>()},
  };
  return D == 64 ? all[0] : D == 128 ? all[1] : nullptr;
}

}  // namespace sk::incremental_prefill
