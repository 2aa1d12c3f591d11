// select_tokens: which entries of a row of scores are kept, compacted in order. One block per row: a radix select finds
// the score of the last one kept (only when the list is limited), then two passes count and place.
#pragma once

#include "select_tokens/params.h"
#include "streamkernels/numbers.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::select_tokens {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kPasses = 4, kDigitBits = 8, kBins = 1 << kDigitBits, kBinsPerLane = kBins / 32;
constexpr uint32_t kNotCandidate = 0;
constexpr unsigned kAll = 0xffffffffu;

// Threads for rows of K entries.
inline int threads_for(int K) {
  return K <= 2048 ? 256 : kMaxThreads;
}

// A score as an unsigned number of the same order; smaller than every number: NaN. Zero of either sign is one number.
SK_HOST_DEVICE uint32_t ordered(float x) {
  if (x != x) return kNotCandidate;
  const uint32_t bits = bits_of<uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The scores of one row as ordered numbers, kNotCandidate for what can never be kept.
template <typename Element>
struct Row {
  const Element* scores;
  int64_t stride;
  int length;  // entries that take part
  float threshold;
  bool thresholded, largest;

  __device__ __forceinline__ uint32_t operator[](int i) const {
    if (i >= length) return kNotCandidate;
    const float x = to_float(scores[i * stride]);
    if (thresholded && !(largest ? x > threshold : x < threshold)) return kNotCandidate;
    return ordered(largest ? x : -x);
  }
};

// Kept are the entries above `floor`, and of those equal to it the first `ties`.
struct Cut {
  uint32_t floor;
  int ties;
};

// The bin, counted from the top, in which the `wanted`-th entry lies; `above` entries are in higher bins. Every warp
// finds it for itself.
struct Bin {
  int digit, above, inside, total;
};

__device__ __forceinline__ Bin find_bin(const int* histogram, int wanted) {
  const int lane = threadIdx.x % 32;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerLane; ++i) own += histogram[lane * kBinsPerLane + i];
  int from_here = own;  // entries in this lane's bins and all higher ones
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_down_sync(kAll, from_here, step);
    if (lane + step < 32) from_here += other;
  }
  Bin bin{0, from_here - own, 0, __shfl_sync(kAll, from_here, 0)};
  const bool here = bin.above < wanted && wanted <= from_here;
  for (int i = kBinsPerLane - 1; here && i >= 0; --i) {
    bin.digit = lane * kBinsPerLane + i;
    bin.inside = histogram[bin.digit];
    if (wanted <= bin.above + bin.inside) break;
    bin.above += bin.inside;
  }
  const unsigned found = __ballot_sync(kAll, here);
  const int source = found ? __ffs(found) - 1 : 0;
  bin.digit = __shfl_sync(kAll, bin.digit, source);
  bin.above = __shfl_sync(kAll, bin.above, source);
  bin.inside = __shfl_sync(kAll, bin.inside, source);
  return bin;
}

template <typename Element>
__device__ __forceinline__ Cut find_cut(const Row<Element>& row, int limit) {
  __shared__ int histograms[kPasses * kBins];
  if (limit == 0) return {kAll, 0};
  for (int i = threadIdx.x; i < kPasses * kBins; i += blockDim.x) histograms[i] = 0;
  __syncthreads();
  uint32_t prefix = 0;
  int wanted = limit;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = 32 - kDigitBits * (pass + 1);
    int* histogram = histograms + pass * kBins;
#pragma unroll 4
    for (int i = threadIdx.x; i < row.length; i += blockDim.x) {
      const uint32_t key = row[i];
      // the shift in two steps: 32 at once is not defined
      const bool same = (key >> shift >> kDigitBits) == prefix;
      if (key != kNotCandidate && same) atomicAdd(histogram + ((key >> shift) & (kBins - 1)), 1);
    }
    __syncthreads();
    const Bin bin = find_bin(histogram, wanted);
    if (pass == 0 && bin.total <= limit) return {1, INT32_MAX};
    prefix = prefix << kDigitBits | bin.digit;
    wanted -= bin.above;
    // the whole bin is kept: no need to look inside of it
    if (bin.inside == wanted) return {max(prefix << shift, 1u) - 1, 0};
  }
  return {prefix, wanted};
}

template <typename Element>
__global__ void __launch_bounds__(kMaxThreads) select_tokens_kernel(const __grid_constant__ Params p) {
  __shared__ int above_of[kMaxWarps], equal_of[kMaxWarps];
  const int b = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  wait_for_launch_before();
  Element rounded;
  from_float(p.threshold, rounded);
  int length = p.K;
  if (p.count.data != nullptr) {
    length = min(max(static_cast<const int32_t*>(p.count.data)[b * p.count.batch], 0), p.K);
  }
  const Row<Element> row{static_cast<const Element*>(p.scores.data) + b * p.scores.batch,
                         p.scores.row,
                         length,
                         to_float(rounded),
                         p.thresholded,
                         p.largest};
  const Cut cut = p.limit < length ? find_cut(row, p.limit) : Cut{kNotCandidate, 0};

  // each warp owns a run of the row, so that order costs no more than one number per warp
  const int run = (length + 32 * warps - 1) / (32 * warps) * 32;
  const int begin = warp * run;
  int above = 0, equal = 0;
#pragma unroll 8
  for (int i = lane; i < run; i += 32) {
    const uint32_t key = row[begin + i];
    above += key > cut.floor;
    equal += key == cut.floor;
  }
  above = __reduce_add_sync(kAll, above);
  equal = __reduce_add_sync(kAll, equal);
  if (lane == 0) {
    above_of[warp] = above;
    equal_of[warp] = equal;
  }
  __syncthreads();
  const int other_above = lane < warps ? above_of[lane] : 0, other_equal = lane < warps ? equal_of[lane] : 0;
  int equal_before = __reduce_add_sync(kAll, lane < warp ? other_equal : 0);
  int above_before = __reduce_add_sync(kAll, lane < warp ? other_above : 0);
  const int kept = __reduce_add_sync(kAll, other_above) + min(__reduce_add_sync(kAll, other_equal), cut.ties);

  const unsigned earlier_lanes = (1u << lane) - 1;
  int32_t* out = p.out + static_cast<int64_t>(b) * p.width;
  const int32_t* names = static_cast<const int32_t*>(p.index.data);
#pragma unroll 4
  for (int i = lane; i < run; i += 32) {
    const int entry = begin + i;
    const uint32_t key = row[entry];
    const unsigned aboves = __ballot_sync(kAll, key > cut.floor);
    const unsigned equals = __ballot_sync(kAll, key == cut.floor);
    const int rank = equal_before + __popc(equals & earlier_lanes);
    if (key > cut.floor || (key == cut.floor && rank < cut.ties)) {
      const int place = above_before + __popc(aboves & earlier_lanes) + min(rank, cut.ties);
      out[place] = names == nullptr ? entry : names[b * p.index.batch + entry * p.index.row];
    }
    above_before += __popc(aboves);
    equal_before += __popc(equals);
  }
  for (int i = kept + threadIdx.x; i < p.width; i += blockDim.x) out[i] = -1;
  if (threadIdx.x == 0) p.out_count[b] = kept;
}

}  // namespace sk::select_tokens
