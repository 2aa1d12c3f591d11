#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

#include "incremental_prefill/instance.h"
#include "incremental_prefill/plain/config.h"
#include "incremental_prefill/plan.h"
#include "incremental_prefill/tuning.h"
#include "streamkernels/error.h"
#include "streamkernels/numbers.cuh"
#include "streamkernels/overlap.cuh"
#include "streamkernels/runtime.h"

namespace sk::incremental_prefill {

extern template const Instance* instances<BFloat16, 64>();
extern template const Instance* instances<BFloat16, 96>();
extern template const Instance* instances<BFloat16, 128>();
extern template const Instance* instances<BFloat16, 256>();
extern template const Instance* instances<Float16, 64>();
extern template const Instance* instances<Float16, 96>();
extern template const Instance* instances<Float16, 128>();
extern template const Instance* instances<Float16, 256>();

namespace {

constexpr int kHeadDims[] = {64, 96, 128, 256};
constexpr int kMaxStages = 6, kMaxDevices = 64, kClusterSizes = 4, kMaxCluster = 8;  // 1, 2, 4, 8 blocks
constexpr int kWorthABlock = 128;                                                    // keys
constexpr float kLog2E = 1.4426950408889634f;

template <typename Element>
const Instance* of_type(int D) {
  switch (D) {
    case 64:
      return instances<Element, 64>();
    case 96:
      return instances<Element, 96>();
    case 128:
      return instances<Element, 128>();
    case 256:
      return instances<Element, 256>();
    default:
      return nullptr;
  }
}

const Instance* table(DType dtype, int D) {
  return dtype == DType::kBFloat16 ? of_type<BFloat16>(D) : of_type<Float16>(D);
}

// What does not change while the process lives, asked once per device.
struct Machine {
  int processors = 0, shared = 0;
  bool clusters = false;
};

const Machine& machine(int device) {
  static Machine known[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) throw CudaError(cudaErrorInvalidDevice, "no such CUDA device");
  std::call_once(asked[device], [device] {
    Machine& m = known[device];
    int major = 0;
    check(cudaDeviceGetAttribute(&m.processors, cudaDevAttrMultiProcessorCount, device), "asking the device");
    check(cudaDeviceGetAttribute(&m.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking the device");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the device");
    m.clusters = major >= 9;
  });
  return known[device];
}

struct Config {
  const Instance* instance;
  int cluster;  // blocks
  int stages, shared;
  int items;
  int workers;  // clusters that run at once
};

int stages_that_fit(const Instance& i, int header, int shared) {
  return std::min(kMaxStages, (shared - header - i.query) / i.stage);
}

bool fits(const Instance& i, int header, int shared) {
  return stages_that_fit(i, header, shared) >= 1 && header + i.out <= shared;
}

// Clusters of `size` blocks that the device runs at once; lets the kernel have its shared memory. Asked once.
int workers_of(const Instance& i, int size, int device) {
  static std::atomic<int> known[kMaxDevices][2][4][kInstances][kClusterSizes];
  int dtype = 0, dim = 0, tile = 0, log = 0;
  for (dtype = 0; dtype < 2; ++dtype) {
    for (dim = 0; dim < 4; ++dim) {
      const Instance* all = table(dtype ? DType::kBFloat16 : DType::kFloat16, kHeadDims[dim]);
      if (&i >= all && &i < all + kInstances) {
        tile = static_cast<int>(&i - all);
        goto found;
      }
    }
  }
found:
  while (1 << log < size) ++log;
  std::atomic<int>& slot = known[device][dtype][dim][tile][log];
  int workers = slot.load(std::memory_order_relaxed);
  if (workers > 0) return workers;
  const Machine& m = machine(device);
  check(cudaFuncSetAttribute(i.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, m.shared),
        "incremental_prefill: asking for shared memory");
  workers = m.processors / size;
  if (size > 1) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    config.gridDim = dim3(workers * size);
    config.blockDim = dim3(i.threads);
    config.dynamicSmemBytes = m.shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int most = 0;
    check(cudaOccupancyMaxActiveClusters(&most, i.kernel, &config), "incremental_prefill: counting clusters");
    workers = std::max(1, std::min(workers, most));
  }
  slot.store(workers, std::memory_order_relaxed);
  return workers;
}

// Bytes of keys, or of partial results, that one block reads in a microsecond; what beginning and ending an item takes
// it, and handing a part over to other clusters. Measured on an H200.
constexpr float kBytesPerMicrosecond = 32 << 10, kItemMicroseconds = 6.f, kHandOverMicroseconds = 3.f;
// Steps of a block that beginning and ending an item takes as long as.
constexpr int kBeginning = 10;
// Longer caches are cut as this one is: the clusters that suit them would be slow while they are short.
constexpr int kPlannedKeys = 32 << 10;
// Cycles that blocks of a plain session wait for those with the same rows, which end a few microseconds apart.
constexpr int kPatience = 1 << 15;

// Microseconds that clusters of `size` blocks take, but for what all sizes have in common.
float estimate(const Instance& i, int items, int rows, int keys, int workers, int size) {
  const int steps = std::max(1, (keys + i.keys - 1) / i.keys), worth = size * std::max(1, kWorthABlock / i.keys);
  const int each = std::min(workers / items, std::max(1, steps / worth));
  float share = static_cast<float>(items) * steps / std::min(workers, items * std::max(1, steps / worth));
  float parts = std::max(1.f, static_cast<float>(workers) / items), begun = 1.f + static_cast<float>(items) / workers;
  if (each > 0) {
    const float even = std::ceil(static_cast<float>(steps) / each);
    if (even <= share + kStraddling * size) share = even, parts = each, begun = 1.f;
  }
  const float partial = static_cast<float>(std::min(rows, i.rows)) * i.partial / i.rows * sizeof(float);
  return std::ceil(share / size) * i.stage / kBytesPerMicrosecond + begun * kItemMicroseconds +
         (parts > 1.f ? kHandOverMicroseconds + parts * partial / size / kBytesPerMicrosecond : 0.f);
}

Config configure(const Params& p, DType dtype, int device) {
  const Machine& m = machine(device);
  const Instance* all = table(dtype, p.D);
  const int rows = p.T * (p.H / p.HK);
  int i = 0;
  const auto has = [&](int n) { return n < kInstances && all[n].kernel != nullptr; };
  while (has(i + 1) && all[i].rows < rows && fits(all[i + 1], all[i + 1].header(p.T, p.B), m.shared)) ++i;
  if (tuning().rows) {
    for (i = 0; has(i + 1) && all[i].rows < tuning().rows;) ++i;
  }
  Config c{&all[i], 1, 0, 0, 0, 0};
  const int header = c.instance->header(p.T, p.B);
  c.stages = stages_that_fit(*c.instance, header, m.shared);
  c.shared = header + std::max(c.instance->query + c.stages * c.instance->stage, c.instance->out);
  c.items = p.B * p.HK * ((rows + c.instance->rows - 1) / c.instance->rows);
  c.workers = workers_of(*c.instance, 1, device);
  if (m.clusters) {
    // lengths are the device's, capacities are known
    const int keys =
        static_cast<int>(std::min<int64_t>(int64_t{p.segments[0].capacity} + p.segments[1].capacity, kPlannedKeys));
    float least = estimate(*c.instance, c.items, rows, keys, c.workers, 1);
    for (int size = 2; size <= kMaxCluster; size *= 2) {
      const int workers = workers_of(*c.instance, size, device);
      if (workers < c.items && !tuning().cluster) break;
      const float time = estimate(*c.instance, c.items, rows, keys, workers, size);
      if (tuning().cluster ? tuning().cluster != size : time > least) continue;
      least = time, c.cluster = size, c.workers = workers;
    }
  }
  return c;
}

bool wide_angles(const Params& p) {
  if (p.rotary_dim == 0) return true;
  const int size = p.angles_fp32 ? 4 : 2;
  return p.rotary_dim % 16 == 0 && aligned(p.cosine, size) && aligned(p.sine, size);
}

}  // namespace

Tuning& tuning() {
  static Tuning t;
  return t;
}

const char* refusal(const Params& p, DType dtype, int device) {
  for (const Segment& s : p.segments) {
    if (s.capacity > 0 && !(aligned(s.k, 2) && aligned(s.v, 2))) {
      return "the rows of the cache do not lie on 16-byte borders";
    }
  }
  const Instance& smallest = table(dtype, p.D)[0];
  if (!fits(smallest, smallest.header(p.T, p.B), machine(device).shared)) {
    return "the device has too little shared memory for a block";
  }
  return nullptr;
}

Workspace workspace(const Params& p, DType dtype, int device) {
  // enough for clusters of every size
  const Config c = configure(p, dtype, device);
  const size_t workers = machine(device).processors;
  const Workspace plain = p.B == 1 ? plain_workspace(p, dtype, device) : Workspace{0, 0};
  return {std::max(plain.counters, static_cast<size_t>(c.items) * kMaxCluster),
          std::max(plain.partials, 2 * workers * c.instance->partial * sizeof(float))};
}

namespace {

// What both kernels are told of a call.
Plan plan_of(const Params& p) {
  Plan plan{};
  plan.R = p.H / p.HK;
  plan.by_R = static_cast<uint32_t>(((uint64_t{1} << 32) + plan.R - 1) / plan.R);
  const bool bounded = p.segments[0].window > 0 || p.segments[1].window > 0;
  const bool looks = p.role != nullptr || p.limit.data != nullptr || p.segments[0].begin.data != nullptr ||
                     p.segments[1].begin.data != nullptr;
  plan.plain = p.B == 1 && !bounded && !looks && (p.segment == kSource || p.segment == kTarget);
  const bool angles = wide_angles(p);
  plan.wide_q = angles && aligned(p.q, 2);
  plan.wide_kv = angles && aligned(p.k, 2) && aligned(p.v, 2);
  const float size = std::fabs(p.scale);
  plan.sign = p.scale > 0.f ? 1.f : p.scale < 0.f ? -1.f : 0.f;
  plan.scale = p.scale == 0.f ? 1.f : size * kLog2E;
  if (p.softcap != 0.f) {
    plan.inner = p.scale == 0.f ? 1.f : size / p.softcap;
    plan.outer = p.softcap * kLog2E;
    plan.scale = 1.f;
  }
  return plan;
}

// 2^result keys' tiles are worth a cluster of `blocks`.
int smallest_of(int keys, int blocks) {
  const int steps = std::max(1, (tuning().smallest ? tuning().smallest : kWorthABlock) / keys) * blocks;
  int smallest = 0;
  while (1 << (smallest + 1) <= steps) ++smallest;
  return smallest;
}

void launch_clusters(Kernel kernel, const Params& p, const Plan& plan, int clusters, int size, int threads, int shared,
                     int device, uintptr_t stream) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  config.gridDim = dim3(clusters * size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (can_overlap(device)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (size > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  }
  check(cudaLaunchKernelEx(&config, kernel, p, plan), "incremental_prefill: launching");
}

}  // namespace

void launch(const Params& p, DType dtype, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  Plan plan = plan_of(p);
  if (plan.plain && plan.wide_q && plan.wide_kv) {
    if (const auto c = plain_config(p, dtype, device)) {
      plan.stages = c->stages;
      plan.smallest = smallest_of(c->instance->keys, c->cluster);
      plan.tiles_m = c->tiles_m;
      plan.workers_each = c->parts;
      plan.own_rows = c->own_rows;
      plan.inbox = c->inbox;
      plan.patience = tuning().patience ? tuning().patience - 1 : kPatience;
      plan.keep = plan.tiles_m == 1 ? kStream : kKeep;
      return launch_clusters(c->instance->kernel, p, plan, p.HK * c->tiles_m * c->parts, c->cluster,
                             c->instance->threads, c->shared, device, stream);
    }
  }
  const Config c = configure(p, dtype, device);
  plan.stages = c.stages;
  plan.smallest = smallest_of(c.instance->keys, c.cluster);
  plan.tiles_m = c.items / (p.B * p.HK);
  plan.workers_each = c.workers / c.items;
  plan.keep = plan.tiles_m == 1 && tuning().keep == 0 ? kStream : kKeep;
  // a cluster's step is as many times shorter as it has blocks
  plan.begin = p.B > 1 ? (tuning().begin ? tuning().begin - 1 : kBeginning) * c.cluster : 0;
  launch_clusters(c.instance->kernel, p, plan, c.workers, c.cluster, c.instance->threads, c.shared, device, stream);
}

void preload(int device) {
  const DeviceGuard guard(device);
  plain_preload(device);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int D : kHeadDims) {
      const Instance* all = table(dtype, D);
      for (int i = 0; i < kInstances && all[i].kernel != nullptr; ++i) {
        for (int size = 1; size <= (machine(device).clusters ? kMaxCluster : 1); size *= 2) {
          if (fits(all[i], all[i].header(1, 1), machine(device).shared)) workers_of(all[i], size, device);
        }
      }
    }
  }
}

}  // namespace sk::incremental_prefill
