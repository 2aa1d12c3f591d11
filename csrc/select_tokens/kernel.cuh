// select_tokens: which entries of a row of scores are kept, compacted in order. Where the list is limited one block has
// the row: a radix select finds the score of the last one kept, then two passes count and place. Where only a threshold
// counts, many blocks have a share of the row each, and each counts the whole row for itself: nothing passes between
// them.
#pragma once

#include <algorithm>

#include "select_tokens/params.h"
#include "streamkernels/chunk.cuh"
#include "streamkernels/overlap.cuh"

namespace sk::select_tokens {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kPasses = 4, kDigitBits = 8, kBins = 1 << kDigitBits, kBinsPerLane = kBins / 32;
constexpr uint32_t kNotCandidate = 0;
constexpr unsigned kAll = 0xffffffffu;

// Threads of a block for rows of K entries.
inline int threads_for(int K) {
  return K <= 2048 ? 256 : kMaxThreads;
}

// Blocks that share a row.
inline int blocks_for(const Params& p, int multiprocessors) {
  if (p.limit < p.K || threads_for(p.K) < kMaxThreads) return 1;
  return std::min((p.K - 1) / kMaxThreads + 1, std::max(1, multiprocessors / p.B));
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

  __device__ __forceinline__ bool may_keep(float x) const {
    return thresholded ? (largest ? x > threshold : x < threshold) : x == x;
  }
  __device__ __forceinline__ uint32_t operator[](int i) const {
    if (i >= length) return kNotCandidate;
    const float x = to_float(scores[i * stride]);
    if (thresholded && !(largest ? x > threshold : x < threshold)) return kNotCandidate;
    return ordered(largest ? x : -x);
  }
};

// How many of the entries [begin, end) may be kept: this thread's share.
template <typename Element>
__device__ __forceinline__ int count_candidates(const Row<Element>& row, int begin, int end) {
  constexpr int kWidth = 16 / sizeof(Element);
  int count = 0;
  // `begin` is that of the row or of a block's share
  if (row.stride == 1 && reinterpret_cast<uintptr_t>(row.scores + begin) % 16 == 0) {
    const int vectors = (end - begin) / kWidth;
    const Element* from = row.scores + begin;
    begin += vectors * kWidth;
#pragma unroll(32 / kWidth)
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      Chunk<Element, kWidth> chunk;
      chunk.load(from + i * kWidth);
      float x[kWidth];
      chunk.unpack(x);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) count += row.may_keep(x[e]);
    }
  }
#pragma unroll 4
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x)
    count += row.may_keep(to_float(row.scores[i * row.stride]));
  return count;
}

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
__global__ void __launch_bounds__(kMaxThreads)
    select_tokens_kernel(const __grid_constant__ Params p, const __grid_constant__ int blocks) {
  __shared__ int above_of[kMaxWarps], equal_of[kMaxWarps], before_of[kMaxWarps], all_of[kMaxWarps];
  const int b = blockIdx.x / blocks, block = blockIdx.x % blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32,
            warps = blockDim.x / 32;
  wait_for_launch_before();
  let_next_launch_begin();
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

  // this block's share; with more than one block the cut is none
  const int share = ((length + blocks - 1) / blocks + 31) / 32 * 32;
  const int first = min(length, block * share), last = min(length, first + share);
  if (blocks > 1) {
    const int before = __reduce_add_sync(kAll, count_candidates(row, 0, first));
    const int behind = __reduce_add_sync(kAll, count_candidates(row, first, length));
    if (lane == 0) {
      before_of[warp] = before;
      all_of[warp] = before + behind;
    }
  }
  // each warp owns a run of the share, so that order costs no more than one number per warp
  const int run = (last - first + 32 * warps - 1) / (32 * warps) * 32;
  const int begin = first + warp * run;
  const auto key_at = [&](int i) { return i < last ? row[i] : kNotCandidate; };
  int above = 0, equal = 0;
#pragma unroll 8
  for (int i = lane; i < run; i += 32) {
    const uint32_t key = key_at(begin + i);
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
  int kept = __reduce_add_sync(kAll, other_above) + min(__reduce_add_sync(kAll, other_equal), cut.ties);
  if (blocks > 1) {
    above_before += __reduce_add_sync(kAll, lane < warps ? before_of[lane] : 0);
    kept = __reduce_add_sync(kAll, lane < warps ? all_of[lane] : 0);
  }

  const unsigned earlier_lanes = (1u << lane) - 1;
  int32_t* out = p.out + static_cast<int64_t>(b) * p.width;
  const int32_t* names = static_cast<const int32_t*>(p.index.data);
#pragma unroll 4
  for (int i = lane; i < run; i += 32) {
    const int entry = begin + i;
    const uint32_t key = key_at(entry);
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
  for (int64_t i = kept + block * blockDim.x + threadIdx.x; i < p.width; i += blocks * blockDim.x) out[i] = -1;
  if (block == 0 && threadIdx.x == 0) p.out_count[b] = kept;
}

}  // namespace sk::select_tokens
