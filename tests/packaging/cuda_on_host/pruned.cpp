// The kernels of pruning run on the host; span_attention's products need a GPU, so here it only says so.
#include <cmath>

#include "cuda_on_host.h"
#include "products_on_host.h"

#include "compact/kernel.cuh"
#include "rotate/kernel.cuh"
#include "select_tokens/kernel.cuh"
#include "span_attention/share.cuh"
#include "streamkernels/error.h"
#include "token_scores/kernel.cuh"
#include "token_scores/tiles.cuh"

extern int processors;

namespace sk {

namespace token_scores {

template <typename Element>
auto choose(int steps) {
  return steps == 2   ? token_scores_tiles_kernel<Element, 2>
         : steps == 4 ? token_scores_tiles_kernel<Element, 4>
                      : token_scores_tiles_kernel<Element, kAnySteps>;
}

void preload(int) {}

void launch(const Params& p, DType dtype, int, uintptr_t) {
  if (p.B == 0 || p.K == 0) return;
  if (dtype == DType::kFloat32) {
    const Plan plan = make_plan(p, size_of(dtype), processors);
    const auto kernel = plan.chunks == 2   ? token_scores_kernel<32, 2>
                        : plan.lanes == 8  ? token_scores_kernel<8, 1>
                        : plan.lanes == 16 ? token_scores_kernel<16, 1>
                                           : token_scores_kernel<32, 1>;
    return host::launch(kernel, static_cast<unsigned>(plan.blocks), kThreads, p, plan);
  }
  const bool vectors = on_borders(p, 2);
  const int steps = tile_steps(p.D, vectors);
  const TilePlan plan = make_tile_plan(p, steps, vectors, {processors, host::kShared, host::kShared});
  const auto kernel = dtype == DType::kFloat16 ? choose<Float16>(steps) : choose<BFloat16>(steps);
  // what no thread has written is NaN
  std::memset(host::dynamic, 0xff, host::kShared);
  host::launch(kernel, static_cast<unsigned>(plan.blocks), 32 * plan.warps, p, plan);
}

}  // namespace token_scores

namespace select_tokens {

void preload(int) {}

void launch(const Params& p, DType dtype, int, uintptr_t) {
  const auto kernel = dtype == DType::kFloat32   ? select_tokens_kernel<float>
                      : dtype == DType::kFloat16 ? select_tokens_kernel<Float16>
                                                 : select_tokens_kernel<BFloat16>;
  if (p.B == 0) return;
  const int blocks = blocks_for(p, processors);
  host::launch(kernel, p.B * blocks, threads_for(p.K), p, blocks);
}

}  // namespace select_tokens

namespace compact {

void preload(int) {}

void launch(const Params& params, int size, int, uintptr_t) {
  const int unit = unit_of(params, size);
  const Params p = in_units(params, size, unit);
  const Plan plan = make_plan(p);
  const auto kernel = unit == 16  ? compact_kernel<uint4>
                      : unit == 8 ? compact_kernel<uint2>
                      : unit == 4 ? compact_kernel<uint32_t>
                      : unit == 2 ? compact_kernel<uint16_t>
                                  : compact_kernel<uint8_t>;
  host::launch(kernel, static_cast<unsigned>(plan.blocks), kThreads, p, plan);
}

}  // namespace compact

namespace rotate {

template <typename Element>
auto choose(bool vectors, bool interleaved) {
  constexpr int kWidth = 16 / sizeof(Element);
  if (!vectors) return interleaved ? rotate_kernel<Element, 1, true> : rotate_kernel<Element, 1, false>;
  return interleaved ? rotate_kernel<Element, kWidth, true> : rotate_kernel<Element, kWidth, false>;
}

void preload(int) {}

void launch(const Params& p, DType dtype, int, uintptr_t) {
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  const int width = access_width(p, size_of(dtype));
  const Plan plan = make_plan(p, width, processors);
  const auto kernel = dtype == DType::kFloat32   ? choose<float>(width > 1, p.interleaved)
                      : dtype == DType::kFloat16 ? choose<Float16>(width > 1, p.interleaved)
                                                 : choose<BFloat16>(width > 1, p.interleaved);
  host::launch(kernel, static_cast<unsigned>(plan.blocks), kThreads, p, plan);
}

}  // namespace rotate

namespace span_attention {

int splits(const Params&, int) {
  return 1;
}
void preload(int) {}
void launch(const Params&, int, DType, int, uintptr_t) {
  throw NotSupported("span_attention: not on the host");
}

// how often the blocks of one batch row, kv head and tile of rows go through each key of each slot
void walk(Params p, int unit, int tiles, int split, int splits, int* times) {
  static int2 spans[64][kMaxSlots];
  static Range ranges[kMaxSlots];
  const Tile tile(p, unit, tiles, 64);
  find_share<64>(p, tile, split, splits, spans, ranges);
  Cursor cursor{0, ranges[0].begin};
  cursor.settle(ranges, p.N);
  while (cursor.n < p.N) {
    const int key = threadIdx.x < kKeys ? key_of(p, tile, cursor, ranges, threadIdx.x) : -1;
    if (key >= 0) ++times[cursor.n * p.S + key];
    cursor.next(ranges, p.N);
  }
}

}  // namespace span_attention
}  // namespace sk

// times int32 [B * HK * tiles, N, S]; bounds [B, T, N, 2], kept [B, HK, K], kept_count [B, HK], contiguous
extern "C" __attribute__((visibility("default"))) void walk_of(int B, int H, int HK, int T, int S, int N, int K,
                                                               const int8_t* rules, const int32_t* bounds,
                                                               int32_t* kept, int32_t* kept_count, int splits,
                                                               int32_t* times) {
  using namespace sk::span_attention;
  Params p{};
  p.B = B;
  p.H = H;
  p.HK = HK;
  p.T = T;
  p.S = S;
  p.N = N;
  p.K = K;
  p.bounds = bounds;
  for (int n = 0; n < N; ++n) p.rules[n] = static_cast<Rule>(rules[n]);
  p.kept = {kept, int64_t{HK} * K, K, 1};
  p.kept_count = {kept_count, HK, 1};
  const int tiles = (T * (H / HK) + 63) / 64;
  for (int unit = 0; unit < B * HK * tiles; ++unit) {
    for (int split = 0; split < splits; ++split) {
      host::launch(walk, 1, kThreads, p, unit, tiles, split, splits, times + int64_t{unit} * N * S);
    }
  }
}
