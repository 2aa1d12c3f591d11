#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>

#include "streamkernels/error.h"
#include "streamkernels/runtime.h"
#include "token_scores/kernel.cuh"
#include "token_scores/tiles.cuh"

namespace sk::token_scores {
namespace {

constexpr int kMaxDevices = 64;
using Kernel = void (*)(Params, Plan);
using TileKernel = void (*)(Params, TilePlan);

Kernel choose(int lanes, int chunks) {
  switch (lanes) {
    case 8:
      return token_scores_kernel<8, 1>;
    case 16:
      return token_scores_kernel<16, 1>;
    default:
      return chunks == 2 ? token_scores_kernel<32, 2> : token_scores_kernel<32, 1>;
  }
}

constexpr int kTileInstances = 6;

template <typename Element>
TileKernel choose_tile(int steps) {
  switch (steps) {
    case 2:
      return token_scores_tiles_kernel<Element, 2>;
    case 4:
      return token_scores_tiles_kernel<Element, 4>;
    default:
      return token_scores_tiles_kernel<Element, kAnySteps>;
  }
}
TileKernel choose_tile(DType dtype, int steps) {
  return dtype == DType::kFloat16 ? choose_tile<Float16>(steps) : choose_tile<BFloat16>(steps);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "token_scores: asking for the device's shared memory");
  return value;
}

// The kernel on the device, and allowed the shared memory of its most warps; once per device and instance.
TileKernel load_tile(DType dtype, int steps, int device, Machine& machine) {
  static std::atomic<int> of_block[kMaxDevices][kTileInstances], of_processor[kMaxDevices];
  const int which = 3 * (dtype == DType::kFloat16) + steps / 4;
  const TileKernel kernel = choose_tile(dtype, steps);
  machine.processors = multiprocessors(device);
  if (of_block[device][which].load() == 0) {
    of_processor[device] = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "token_scores: loading the kernel");
    const int most =
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - static_cast<int>(attributes.sharedSizeBytes);
    const char* what = "token_scores: asking for shared memory";
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          what);
    of_block[device][which] = most;
  }
  machine.shared_of_block = of_block[device][which];
  machine.shared_of_processor = of_processor[device];
  return kernel;
}

void require_blocks(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::invalid_argument("token_scores: index: too many keys for one launch");
}

}  // namespace

void launch(const Params& p, DType dtype, int device, uintptr_t stream) {
  if (p.B == 0 || p.K == 0) return;
  const DeviceGuard guard(device);
  if (dtype == DType::kFloat32) {
    const Plan plan = make_plan(p, size_of(dtype), multiprocessors(device));
    require_blocks(plan.blocks);
    choose(plan.lanes,
           plan.chunks)<<<static_cast<unsigned>(plan.blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        p, plan);
    return check_launch("token_scores");
  }
  const bool vectors = on_borders(p, size_of(dtype));
  const int steps = tile_steps(p.D, vectors);
  Machine machine{};
  const TileKernel kernel = load_tile(dtype, steps, device, machine);
  const TilePlan plan = make_tile_plan(p, steps, vectors, machine);
  if (plan.warps == 0) throw NotSupported("token_scores: q: too many heads for this GPU's shared memory");
  require_blocks(plan.blocks);
  launch_overlapped("token_scores", kernel, plan.blocks, 32 * plan.warps, tile_shared(p.H, steps, plan.warps), device,
                    stream, p, plan);
}

void preload(int device) {
  const DeviceGuard guard(device);
  for (const int lanes : {8, 16, 32, 64}) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, choose(std::min(lanes, 32), lanes == 64 ? 2 : 1)),
          "token_scores: loading the kernel");
  }
  Machine machine{};
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int steps : {2, 4, kAnySteps}) load_tile(dtype, steps, device, machine);
  }
}

}  // namespace sk::token_scores
