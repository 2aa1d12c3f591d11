// The arguments of a launch, brought near.
#pragma once

#include <cstdint>

namespace sk::incremental_prefill {

// The constant cache is cold at first, and a warp waits for each line of the arguments that it needs: here the warps
// bring them in side by side. `anywhere`: room for a word per thread, or the compiler would drop what nobody reads.
template <class S, typename Arguments>
__device__ __forceinline__ void touch(const Arguments& arguments, uint32_t* anywhere) {
  constexpr int kLine = 16, kLines = (sizeof(Arguments) / 4 + kLine - 1) / kLine;  // of 4-byte words
  const auto* words = reinterpret_cast<const uint32_t*>(&arguments);
  const int line = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kLines; i += S::kThreads / 32) {
    if (i + line < kLines) anywhere[threadIdx.x] = words[(i + line) * kLine];
  }
}

}  // namespace sk::incremental_prefill
