#include "incremental_prefill/plain/config.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>

#include "incremental_prefill/tuning.h"
#include "streamkernels/error.h"
#include "streamkernels/numbers.cuh"
#include "streamkernels/runtime.h"

namespace sk::incremental_prefill {

extern template const PlainInstance* plain_instances<BFloat16>(int D);
extern template const PlainInstance* plain_instances<Float16>(int D);

namespace {

constexpr int kMaxDevices = 64, kSizes = 8;
// blocks; the copy engine sends to a cluster alone
constexpr int kClusters[kSizes] = {16, 12, 11, 8, 6, 4, 3, 2};
constexpr int kPlainRows = 64, kStages = 12;  // of a call; key tiles at most

const PlainInstance* table(DType dtype, int D) {
  return dtype == DType::kBFloat16 ? plain_instances<BFloat16>(D) : plain_instances<Float16>(D);
}

// What a device can do with one instance, asked once.
struct Ability {
  std::once_flag asked;
  bool can = false;
  int shared = 0, processors = 0;
  int clusters[kSizes]{};  // that run at once
};

// An image for GPUs without warpgroup products has nothing in it.
constexpr int kRegistersOfSomething = 64;

void ask(Ability& a, const PlainInstance& i, int device) {
  int major = 0, minor = 0, processors = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking the device");
  if (major != 9 || minor != 0) return;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking the device");
  check(cudaDeviceGetAttribute(&a.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking the device");
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, i.kernel), "asking for a kernel");
  if (attributes.numRegs < kRegistersOfSomething) return;
  check(cudaFuncSetAttribute(i.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.shared),
        "incremental_prefill: asking for shared memory");
  check(cudaFuncSetAttribute(i.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "incremental_prefill: asking for clusters");
  a.processors = processors;
  for (int n = 0; n < kSizes; ++n) {
    const int size = kClusters[n];
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    config.gridDim = dim3(processors / size * size);
    config.blockDim = dim3(i.threads);
    config.dynamicSmemBytes = a.shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int most = 0;
    // a part of a GPU may have no room for the largest, and may call that an error
    if (cudaOccupancyMaxActiveClusters(&most, i.kernel, &config) != cudaSuccess) {
      most = 0;
      cudaGetLastError();
    }
    a.clusters[n] = std::min(processors / size, most);
  }
  a.can = true;
}

const Ability* ability_of(const PlainInstance& i, int dtype, int dim, int tile, int device) {
  static Ability all[kMaxDevices][2][3][kPlainInstances];
  Ability& a = all[device][dtype][dim][tile];
  std::call_once(a.asked, [&] { ask(a, i, device); });
  return a.can ? &a : nullptr;
}

// The tiles that can run a call, by rising number of rows.
struct Table {
  const PlainInstance* instance[kPlainInstances]{};
  const Ability* ability[kPlainInstances]{};
  int count = 0, rows = 0;

  Table(const Params& p, DType dtype, int device) : rows(p.T * (p.H / p.HK)) {
    const PlainInstance* all = table(dtype, p.D);
    if (all == nullptr || p.T > kPlainRows || device < 0 || device >= kMaxDevices) return;
    for (int n = 0; n < kPlainInstances && all[n].kernel != nullptr; ++n) {
      const Ability* a = ability_of(all[n], dtype == DType::kBFloat16, p.D / 128, n, device);
      if (a == nullptr) return;
      instance[count] = &all[n], ability[count] = a;
      ++count;
      if (rows <= all[n].rows) return;
    }
  }
  int tiles_m(int n) const { return (rows + instance[n]->rows - 1) / instance[n]->rows; }
};

// Longer caches are cut as this one is: the clusters that suit them would be slow while they are short.
constexpr int kPlannedKeys = 32 << 10;
// Microseconds, measured on an H200 (bench/README.md): of a block for a round of tiles, by warpgroups that share out
// its keys; to begin and end, by the same; for each block that a row's parts come from; to hand parts to other
// clusters; to wait for them.
constexpr float kRound[2] = {0.9f, 1.1f}, kBegin[2] = {6.5f, 4.2f}, kSource = 0.08f, kHandOver = 2.3f, kWait = 0.5f;
// Bytes that a block reads in a microsecond, of keys or of what other clusters leave; that all blocks read, from the L2
// and from memory, where more blocks get a little more.
constexpr float kBlockBytes = 48e3f, kPartBytes = 60e3f, kCacheBytes = 6e6f, kMemoryBytes = 3.5e6f, kMore = 4.5e3f;

// Microseconds of `parts` clusters of `size` blocks for each item.
float estimate(const PlainInstance& i, int tiles_m, int heads, int keys, int own_rows, int size, int parts) {
  const int tiles = (keys + i.keys - 1) / i.keys, each = tiles / (size * parts) + 1;  // the new rows are a tile, too
  const float bytes = static_cast<float>(heads) * tiles * i.stage;
  const float memory = kMemoryBytes + kMore * heads * tiles_m * size * parts;
  const float walk = std::max({(each + i.key_groups - 1) / i.key_groups * kRound[i.key_groups - 1],
                               each * i.stage / kBlockBytes, bytes / memory, bytes * tiles_m / kCacheBytes});
  float others = 0.f;
  if (parts > 1) {
    const int shares = shares_of(own_rows, parts), joined = (own_rows + shares - 1) / shares;
    others = kHandOver + (shares > 1 ? kWait : 0.f) + parts * joined * i.row / kPartBytes;
  }
  return kBegin[i.key_groups - 1] + walk + kSource * size + others;
}

// What a configuration depends on.
struct Sizes {
  int H, HK, T, D, keys, device;
  DType dtype;

  bool operator==(const Sizes& x) const {
    return H == x.H && HK == x.HK && T == x.T && D == x.D && keys == x.keys && device == x.device && dtype == x.dtype;
  }
};

PlainConfig best_config(const Params& p, DType dtype, int device, int keys) {
  const Table table(p, dtype, device);
  PlainConfig best{};
  float least = 0.f;
  for (int t = 0; t < table.count; ++t) {
    const PlainInstance& i = *table.instance[t];
    if (tuning().rows && tuning().rows != i.rows) continue;
    const int tiles_m = table.tiles_m(t), shared = table.ability[t]->shared - i.before_tiles;
    for (int c = 0; c < kSizes; ++c) {
      const int size = kClusters[c], own_rows = (std::min(i.rows, table.rows) + size - 1) / size;
      const int inbox = size * own_rows * i.row, stages = std::min(kStages, (shared - inbox) / i.stage);
      if (stages < 2 || stages * i.stage < i.parked) continue;
      const int parts = table.ability[t]->clusters[c] / (p.HK * tiles_m);
      for (int n = 1; n <= parts; ++n) {
        const float time = estimate(i, tiles_m, p.HK, keys, own_rows, size, n);
        const bool asked = tuning().plain == size && n == std::min(parts, std::max(1, tuning().parts));
        if (tuning().plain > 0 ? !asked : best.cluster != 0 && time >= least) continue;
        least = time;
        best = {&i,
                tiles_m,
                size,
                n,
                own_rows,
                stages,
                i.before_tiles + stages * i.stage + inbox,
                i.before_tiles + stages * i.stage};
      }
    }
  }
  return best;
}

}  // namespace

std::optional<PlainConfig> plain_config(const Params& p, DType dtype, int device) {
  const int keys =
      static_cast<int>(std::min<int64_t>(int64_t{p.segments[0].capacity} + p.segments[1].capacity, kPlannedKeys));
  const Sizes sizes{p.H, p.HK, p.T, p.D, keys, device, dtype};
  // a stream's layers are alike, and weighing all clusters takes microseconds
  thread_local Sizes known{};
  thread_local PlainConfig found{};
  const bool tuned = tuning().plain != 0 || tuning().rows != 0;
  if (tuned || !(sizes == known)) {
    found = tuning().plain < 0 ? PlainConfig{} : best_config(p, dtype, device, keys);
    known = tuned ? Sizes{} : sizes;
  }
  if (found.cluster == 0) return {};
  return found;
}

Workspace plain_workspace(const Params& p, DType dtype, int device) {
  const Table table(p, dtype, device);
  Workspace most{0, 0};
  // enough for clusters of every size
  for (int t = 0; t < table.count; ++t) {
    most.counters = std::max(most.counters, static_cast<size_t>(p.HK) * table.tiles_m(t) * kPlainCluster);
    most.partials = std::max(
        most.partials, static_cast<size_t>(table.ability[t]->processors) * table.instance[t]->partial * sizeof(float));
  }
  return most;
}

void plain_preload(int device) {
  Params p{};
  p.B = p.H = p.HK = 1;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int D : {64, 128, 256}) {
      p.D = D, p.T = kPlainRows, p.H = 2;
      Table(p, dtype, device);
    }
  }
}

}  // namespace sk::incremental_prefill
