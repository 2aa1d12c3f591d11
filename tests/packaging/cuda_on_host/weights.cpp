// What the parts of a row weigh that a cluster's blocks have of it (plain/join.cuh), run on the host.
#include "cuda_on_host.h"
#include "streamkernels/numbers.cuh"

namespace {

// what the headers name besides, and nothing here calls
[[maybe_unused]] int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
[[maybe_unused]] uint64_t __cvta_generic_to_shared(const void*) {
  std::abort();
}
[[maybe_unused]] int __shfl_up_sync(unsigned, int, int) {
  std::abort();
}
[[maybe_unused]] uint32_t atomicAdd(uint32_t*, uint32_t) {
  std::abort();
}
[[maybe_unused]] uint32_t atomicCAS(uint32_t*, uint32_t, uint32_t) {
  std::abort();
}
[[maybe_unused]] long long clock64() {
  std::abort();
}

}  // namespace

namespace sk {
namespace {

float exp2_fast(float x) {
  return std::exp2(x);
}
float log2_fast(float x) {
  return std::log2(x);
}

}  // namespace

namespace incremental_prefill {
[[maybe_unused]] static uint32_t shares_of_block(uint32_t*, int, int, int, uint32_t*) {
  std::abort();
}
}  // namespace incremental_prefill
}  // namespace sk

#include "incremental_prefill/plain/join.cuh"

namespace sk::incremental_prefill {
namespace {

using S = PlainShape<BFloat16, 128, 1>;

void kernel(const Params& p, const Plan& plan, const Rank& rank, int part, int parts, const float2* statistics,
            float* weights) {
  weigh_parts<S>(p, plan, rank, part, parts, statistics, weights);
}

}  // namespace
}  // namespace sk::incremental_prefill

// Block `block` of a cluster of `blocks` joins `own` rows of a tile that has `valid` of them: key head 1 of two, T
// rows, R query heads each; `part` of `parts` clusters. From statistics [blocks, own] (m, l) and `sinks` [2 R] or null
// come weights [own, blocks] and lse [2 R, T], or, with more than one part, (m, l) of the tile's rows [64].
extern "C" __attribute__((visibility("default"))) void weigh(int block, int blocks, int own, int valid, int R, int T,
                                                             int part, int parts, const float* statistics,
                                                             const float* sinks, float* weights, float* lse,
                                                             float* left) {
  using namespace sk::incremental_prefill;
  std::vector<float> partials(2 * parts * Partial<S>::kFloats, NAN);
  Params p{};
  p.B = 1, p.HK = 2, p.H = 2 * R, p.T = T, p.D = 128, p.lse = lse, p.partials = partials.data();
  p.sink_logits = sinks, p.sink_logits_fp32 = true;
  Plan plan{};
  plan.R = R, plan.tiles_m = 1;
  plan.by_R = static_cast<uint32_t>(((uint64_t{1} << 32) + R - 1) / R);
  Rank rank{{0, 1, 0}, valid, 1, block, blocks, own, most(0, least(own, valid - block * own))};
  host::launch(kernel, 1, 128, p, plan, rank, part, parts, reinterpret_cast<const float2*>(statistics), weights);
  const Partial<S> written(partials.data(), part * 2 + 1);
  std::memcpy(left, written.o + S::kRows * S::D, S::kRows * 8);
}
