// How a launch for a plain session is set up (kernel.cuh).
#pragma once

#include <cstddef>
#include <optional>

#include "incremental_prefill/instance.h"
#include "incremental_prefill/plan.h"

namespace sk::incremental_prefill {

struct PlainInstance {
  Kernel kernel;
  int rows, keys, threads;
  int key_groups;    // warpgroups that share out the keys of a block
  int stage, row;    // bytes of a key tile, and of one row's partial result
  int parked;        // bytes that partial results take where key tiles were
  int64_t partial;   // floats of one partial result
  int before_tiles;  // bytes of shared memory before the key tiles
};

constexpr int kPlainInstances = 2, kPlainCluster = 16;  // tiles of a head dim, or fewer; most blocks of a cluster

// Blocks that join `rows` rows which `parts` blocks have parts of: eight rows are worth one.
SK_HOST_DEVICE int shares_of(int rows, int parts) {
  return most(1, least(rows / 8, parts));
}

// The instances of a head dim by rising number of rows, then some without a kernel; or null.
template <typename Element>
const PlainInstance* plain_instances(int D);

struct PlainConfig {
  const PlainInstance* instance;
  int tiles_m;         // tiles of a key head's rows
  int cluster, parts;  // blocks; clusters that share an item
  int own_rows;        // rows of a tile that a block joins
  int stages, shared;  // key tiles, bytes of shared memory
  int inbox;           // bytes before the place where parts are taken in
};

// Nothing where the general kernel must run: another GPU, head dim or alignment, many rows. `params` asks for nothing
// but one session whose rows see every key before them.
std::optional<PlainConfig> plain_config(const Params& params, DType dtype, int device);
// Counters and bytes that every launch of these sizes can do with.
Workspace plain_workspace(const Params& params, DType dtype, int device);
void plain_preload(int device);

}  // namespace sk::incremental_prefill
