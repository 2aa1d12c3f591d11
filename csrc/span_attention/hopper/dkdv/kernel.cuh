// dk and dv of span_attention on Hopper, from the statistics that dq's kernel made.
#pragma once

#include "span_attention/hopper/dkdv/attend.cuh"
#include "span_attention/hopper/kernel.cuh"

namespace sk::span_attention::hopper::dkdv {

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    dkdv_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
                const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                const __grid_constant__ CUtensorMap dk, const __grid_constant__ CUtensorMap dv,
                const __grid_constant__ Call c) {
#if SK_WGMMA
  char* const memory = dynamic_memory();
  const Room<S> room{memory, shared_address(memory)};
  if (threadIdx.x == kReaders) {
    for (const CUtensorMap* map : {&q, &dout, &k, &v, &dk, &dv}) prefetch_map(map);
    barriers_init(room.item_full(0), S::kItems, 1);
    barriers_init(room.item_empty(0), S::kItems, kReaderWarps);
    barriers_init(room.full(0), S::kStages, 1);
    barriers_init(room.empty(0), S::kStages, kReaderWarps);
    barrier_publish();
  }
  __syncthreads();
  wait_for_launch_before();
  if (threadIdx.x >= kReaders) {
    hand_in_registers<S::kLoaderRegisters>();
    if (threadIdx.x < kReaders + 32) Loader<S>{&q, &dout, &k, &v, c, room}.run();
    return;
  }
  take_registers<S::kReaderRegisters>();
  Reader<S> reader{&dk, &dv, c, room};
  reader.run();
#endif
}

}  // namespace sk::span_attention::hopper::dkdv
