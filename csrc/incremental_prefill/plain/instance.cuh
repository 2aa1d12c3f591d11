// The tiles of plain sessions: 64 rows, whose keys two warpgroups share out, and 128; 64 alone for 256 columns.
#pragma once

#include "incremental_prefill/plain/config.h"
#include "incremental_prefill/plain/kernel.cuh"

namespace sk::incremental_prefill {

template <class S>
constexpr PlainInstance plain_instance_of() {
  return {plain_prefill_kernel<S>,
          S::kRows,
          S::kKeys,
          S::kThreads,
          S::kKeyGroups,
          S::kStage,
          S::kRow,
          S::kExchange + S::kRows * S::kRow,
          Partial<S>::kFloats,
          PlainLayout<S>::kStages};
}

template <typename Element>
const PlainInstance* plain_instances(int D) {
  // o of 256 columns takes the registers of two warpgroups
  static const PlainInstance all[][kPlainInstances] = {
      {plain_instance_of<PlainShape<Element, 64, 1>>(), plain_instance_of<PlainShape<Element, 64, 2>>()},
      {plain_instance_of<PlainShape<Element, 128, 1>>(), plain_instance_of<PlainShape<Element, 128, 2>>()},
      {plain_instance_of<PlainShape<Element, 256, 1, 1>>(), {}},
  };
  return D == 64 ? all[0] : D == 128 ? all[1] : D == 256 ? all[2] : nullptr;
}

}  // namespace sk::incremental_prefill
