// span_attention for many query rows on Hopper (sm_90a): ATTEND slots, at most two. Blocks stay until all items are
// done and draw the next one when they have fetched the one at hand.
#pragma once

#include "span_attention/hopper/attend.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::span_attention::hopper {

// registers of the threads of each kind
constexpr int kLoaderRegisters = 40, kReaderRegisters = 232;
static_assert(registers_suffice(kReaderRegisters, kLoaderRegisters), "");

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o,
                  const __grid_constant__ Call c) {
#if SK_WGMMA
  char* const memory = dynamic_memory();
  const Room<S> room{memory, shared_address(memory)};
  if (threadIdx.x == kReaders) {
    for (const CUtensorMap* map : {&q, &k, &v, &o}) prefetch_map(map);
    barriers_init(room.item_full(0), S::kItems, 1 + 32);
    barriers_init(room.item_empty(0), S::kItems, kReaders);
    barriers_init(room.item_known(0), S::kItems, 1);
    barriers_init(room.item_fetched(), 1, 1);
    barriers_init(room.keys_full(0), S::kStages, 1);
    barriers_init(room.keys_empty(0), S::kStages, kReaderWarps);
    barriers_init(room.values_full(0), S::kStages, 1);
    barriers_init(room.values_empty(0), S::kStages, kReaderWarps);
    barrier_publish();
  }
  __syncthreads();
  wait_for_launch_before();
  let_next_launch_begin();
  if (threadIdx.x >= kReaders) {
    hand_in_registers<kLoaderRegisters>();
    const int warp = threadIdx.x / 32 - kReaderWarps;
    if (warp == 0) Scout<S>{&q, c, room}.run();
    if (threadIdx.x == kReaders + 32) Loader<S>{&k, &v, c, room}.run();
    return;
  }
  take_registers<kReaderRegisters>();
  Reader<S> reader{&o, c, room};
  reader.run();
#endif
}

}  // namespace sk::span_attention::hopper
