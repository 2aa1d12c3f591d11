// A run of neighbouring elements that one thread moves with one instruction.
#pragma once

#include <cstdint>

#include "streamkernels/numbers.cuh"
#include "streamkernels/platform.h"

namespace sk {

template <int BYTES>
struct Raw;
template <>
struct Raw<16> {
  using type = uint4;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};

template <typename Element, int N>
struct Chunk {
  using Bits = typename Raw<sizeof(Element) * N>::type;
  Bits bits;

  // read once: do not keep it in the caches
  __device__ __forceinline__ void load_streaming(const Element* from) {
    bits = __ldcs(reinterpret_cast<const Bits*>(from));
  }
  __device__ __forceinline__ void load(const Element* from) { bits = __ldg(reinterpret_cast<const Bits*>(from)); }
  __device__ __forceinline__ void store(Element* to) const { *reinterpret_cast<Bits*>(to) = bits; }

  __device__ __forceinline__ void unpack(float (&out)[N]) const {
    Element x[N];
    memcpy(x, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(x[i]);
  }
  __device__ __forceinline__ void pack(const float (&in)[N]) {
    Element x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) from_float(in[i], x[i]);
    memcpy(&bits, x, sizeof(bits));
  }
};

// N angles (cosines or sines) as fp32, from a table of fp32 or of Element; N elements start on a border of their own
// size, at most 16 bytes
template <typename Element, int N>
__device__ __forceinline__ void load_angles(float (&out)[N], const void* table, int64_t offset, bool fp32) {
  constexpr int kWidth = N > 4 ? 4 : N;
  if (fp32) {
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      Chunk<float, kWidth> chunk;
      float part[kWidth];
      chunk.load(static_cast<const float*>(table) + offset + i);
      chunk.unpack(part);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[i + j] = part[j];
    }
  } else {
    Chunk<Element, N> chunk;
    chunk.load(static_cast<const Element*>(table) + offset);
    chunk.unpack(out);
  }
}

}  // namespace sk
