// dq of span_attention for many query rows on Hopper, and the statistics of the rows that dk and dv need.
#pragma once

#include "span_attention/hopper/dq/attend.cuh"
#include "span_attention/hopper/kernel.cuh"

namespace sk::span_attention::hopper::dq {

// registers of the threads of each kind: statistics take more, dq fewer than the forward
constexpr int kLoaderRegisters = 88, kReaderRegisters = 208;

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    dq_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
              const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
              const __grid_constant__ CUtensorMap dq, const __grid_constant__ Call c,
              const __grid_constant__ Inputs in) {
#if SK_WGMMA
  char* const memory = dynamic_memory();
  const Room<S> room{memory, shared_address(memory)};
  if (threadIdx.x == kReaders) {
    for (const CUtensorMap* map : {&q, &dout, &k, &v, &dq}) prefetch_map(map);
    barriers_init(room.item_full(0), S::kItems, 2 + kStatWarps);
    barriers_init(room.item_empty(0), S::kItems, kReaderWarps);
    barriers_init(room.item_known(0), S::kItems, 1);
    barriers_init(room.keys_full(0), S::kKeyStages, 1);
    barriers_init(room.keys_empty(0), S::kKeyStages, kReaderWarps);
    barriers_init(room.values_full(0), S::kValueStages, 1);
    barriers_init(room.values_empty(0), S::kValueStages, kReaderWarps);
    barrier_publish();
  }
  __syncthreads();
  wait_for_launch_before();
  if (threadIdx.x >= kReaders) {
    hand_in_registers<kLoaderRegisters>();
    const int warp = threadIdx.x / 32 - kReaderWarps;
    if (warp == 0) {
      Loader<S, Room<S>>{&q, &dout, &k, &v, c, room}.run();
    } else {
      Statistician<S>{c, in, room}.run(warp - 1);
    }
    return;
  }
  take_registers<kReaderRegisters>();
  Reader<S> reader{&dq, c, in, room};
  reader.run();
#endif
}

}  // namespace sk::span_attention::hopper::dq
