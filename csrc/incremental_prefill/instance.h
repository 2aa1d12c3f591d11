// The compiled instances of the kernel, as data that launch.cu chooses from.
#pragma once

#include <cstddef>
#include <cstdint>

#include "incremental_prefill/params.h"
#include "streamkernels/platform.h"

namespace sk::incremental_prefill {

// How long the L2 should keep keys, as `createpolicy.fractional` encodes it: like anything else; or, where nobody else
// reads them in this call, not at the cost of the kernel's own instructions, of which every miss is waited for.
constexpr uint64_t kKeep = 0x1000000000000000, kStream = 0x12F0000000000000;

// How one launch is set up; what depends on lengths is planned on the device.
struct Plan {
  int stages;            // key tiles in shared memory
  int smallest;          // 2^smallest steps are worth a worker of their own
  int R, tiles_m;        // H / HK; tiles of the T * R rows of a key head
  uint32_t by_R;         // 2^32 / R, rounded up: n / R is the high word of the product
  int workers_each;      // whole workers for each item
  int own_rows, inbox;   // plain/: rows of a tile that a block joins; where it takes in their parts
  int patience;          // plain/: cycles to wait for blocks with the same rows
  int begin;             // steps that beginning an item counts for, where sessions differ
  uint64_t keep;         // how long the L2 should keep keys
  bool plain;            // one session whose rows all see every key before them
  bool wide_q, wide_kv;  // rows and angles can be read 16 bytes at a time
  float scale;           // of scores, times log2(e); 1 after a softcap
  float inner, outer;    // softcap: score -> outer * tanh(inner * score); inner 0: none
  float sign;            // of the scale, applied to q
};

// n / R for n < 2^16
SK_HOST_DEVICE int divide_by_R(const Plan& plan, int n) {
  if (plan.R == 1) return n;
  return static_cast<int>((uint64_t{plan.by_R} * static_cast<uint32_t>(n)) >> 32);
}

using Kernel = void (*)(Params, Plan);

struct Instance {
  Kernel kernel;
  int rows, keys, threads;
  int query, stage, out;  // bytes of the query tile, of a key tile, and of o while it is joined
  int64_t partial;        // floats of one partial result
  int (*header)(int T, int B);
};

constexpr int kInstances = 3;

// Instances of one element type and head dim by rising number of rows; then, maybe, some without a kernel.
template <typename Element, int D>
const Instance* instances();

}  // namespace sk::incremental_prefill
