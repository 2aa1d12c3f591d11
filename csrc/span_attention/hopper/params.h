// What one launch of the Hopper kernel needs beside span_attention's own arguments.
#pragma once

#include <cstdint>

#include "span_attention/params.h"

namespace sk::span_attention::hopper {

constexpr int kMaxSlots = 2;

// Whether the device is a Hopper GPU and this build has code for it (90a).
bool here(int device);
// Why a kernel cannot take a call on this device; null if it can.
const char* refuses(const Params& params, int device);
// Takes one or two ATTEND slots, a head dim of 64 or 128, no softcap, and S >= 1; rows on 16-byte borders.
// `tickets`: two ints, zero, and zero again when the launch is complete; no other launch may use them meanwhile.
void launch(const Params& params, int* tickets, DType dtype, int device, uintptr_t stream);
void preload(int device);

}  // namespace sk::span_attention::hopper
