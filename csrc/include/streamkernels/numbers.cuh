// Element types as plain storage, and their conversions to and from fp32 (round to nearest even).
#pragma once

#include <cstdint>
#include <cstring>

#include "streamkernels/platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sk {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
SK_HOST_DEVICE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

SK_HOST_DEVICE float to_float(float x) {
  return x;
}
SK_HOST_DEVICE float to_float(BFloat16 x) {
  return bits_of<float>(static_cast<uint32_t>(x.bits) << 16);
}

#if defined(__CUDACC__)

SK_HOST_DEVICE float to_float(Float16 x) {
  return __half2float(bits_of<__half>(x.bits));
}
SK_HOST_DEVICE void from_float(float x, float& out) {
  out = x;
}
SK_HOST_DEVICE void from_float(float x, Float16& out) {
  out.bits = bits_of<uint16_t>(__float2half_rn(x));
}
SK_HOST_DEVICE void from_float(float x, BFloat16& out) {
  out.bits = bits_of<uint16_t>(__float2bfloat16_rn(x));
}

#else

SK_HOST_DEVICE float to_float(Float16 x) {
  return static_cast<float>(bits_of<_Float16>(x.bits));
}
SK_HOST_DEVICE void from_float(float x, float& out) {
  out = x;
}
SK_HOST_DEVICE void from_float(float x, Float16& out) {
  out.bits = bits_of<uint16_t>(static_cast<_Float16>(x));
}
SK_HOST_DEVICE void from_float(float x, BFloat16& out) {
  const uint32_t bits = bits_of<uint32_t>(x);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#endif

}  // namespace sk
