// Runs a CUDA kernel's own source on the host, so that its indexing can be tested where there is no GPU.
// The threads of a block are fibers that take turns between synchronisation points; blocks run one after another.
// Says nothing about races, memory order or speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

using std::max;
using std::min;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr size_t kStack = 256 * 1024;
// kLook: looks again later whether something has come about
enum class At { kStart, kBarrier, kBallot, kSum, kShuffle, kLook, kEnd };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at = At::kStart;
  const char* what = "";  // it looks for
  unsigned number = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::vector<int> values;  // what each thread brought to a warp operation
inline std::function<void()> body;
inline unsigned looks_in_vain;
// what goes on beside the threads, once a round: whether something has happened; and the order of warps in a round
inline std::function<bool()> meanwhile = [] { return false; };
inline std::function<unsigned(unsigned, unsigned)> turn_of = [](unsigned n, unsigned) { return n; };

// the calling thread waits until all threads of the block have come to a synchronisation of the same kind
inline void wait(At at) {
  const unsigned thread = threadIdx.x;
  fibers[thread].at = at;
  swapcontext(&fibers[thread].context, &scheduler);
  threadIdx.x = thread;
}

// the calling thread waits until `ready`; the rest is said when that never comes about
template <typename Ready>
void look_until(Ready ready, const char* what, unsigned number) {
  while (!ready()) {
    ++looks_in_vain;
    fibers[threadIdx.x].what = what, fibers[threadIdx.x].number = number;
    wait(At::kLook);
  }
}

inline void enter() {
  body();
  wait(At::kEnd);
}

inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&fibers[t].context);
    fibers[t].context.uc_stack.ss_sp = fibers[t].stack.get();
    fibers[t].context.uc_stack.ss_size = kStack;
    makecontext(&fibers[t].context, enter, 0);
  }
  // warps go on by themselves; at a barrier they wait for each other
  const auto all_at = [&](At at, unsigned begin, unsigned end) {
    return std::all_of(fibers.begin() + begin, fibers.begin() + end, [=](const Fiber& f) { return f.at == at; });
  };
  for (unsigned t = 0; t < threads; ++t) fibers[t].at = At::kStart;
  for (int idle = 0; !all_at(At::kEnd, 0, threads);) {
    const bool together = all_at(At::kBarrier, 0, threads), happened = meanwhile();
    unsigned resumed = 0;
    looks_in_vain = 0;
    for (unsigned n = 0; n < threads; n += 32) {
      const unsigned warp = turn_of(n / 32, (threads + 31) / 32) * 32, end = std::min(threads, warp + 32);
      At at = At::kLook;  // what the warp's threads that do not look have come to
      for (unsigned t = warp; t < end; ++t) {
        if (fibers[t].at == At::kLook || fibers[t].at == at) continue;
        if (at != At::kLook) {
          std::fprintf(stderr, "thread %u is at another synchronisation than others of its warp\n", t);
          std::abort();
        }
        at = fibers[t].at;
      }
      const bool all = all_at(at, warp, end);
      for (unsigned t = warp; t < end; ++t) {
        if (fibers[t].at != At::kLook && (at == At::kEnd || !all || (at == At::kBarrier && !together))) continue;
        ++resumed;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
      }
    }
    idle = happened || resumed > looks_in_vain ? 0 : idle + 1;
    if (idle > 1000) {
      std::fprintf(stderr, "threads wait for something that never comes about:\n");
      for (unsigned t = 0; t < threads; t += 16) {
        const Fiber& f = fibers[t];
        std::fprintf(stderr, "thread %u is at %d: %s %u\n", t, static_cast<int>(f.at), f.what, f.number);
      }
      std::abort();
    }
  }
}

template <typename Kernel, typename... Args>
void launch_one(Kernel kernel, unsigned block, unsigned blocks, unsigned threads, const Args&... args) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  values.assign(threads, 0);
  blockIdx.x = block, blockDim.x = threads, gridDim.x = blocks;
  body = [&] { kernel(args...); };
  run_block(threads);
}
template <typename Kernel, typename... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, const Args&... args) {
  for (unsigned block = 0; block < blocks; ++block) launch_one(kernel, block, blocks, threads, args...);
}

// every lane of the warp brings a value and gets what `combine` makes of all 32
template <typename Combine>
auto warp(At at, int value, Combine combine) {
  values[threadIdx.x] = value;
  wait(at);
  const auto result = combine(&values[threadIdx.x / 32 * 32]);
  wait(at);
  return result;
}

}  // namespace host

inline void __syncthreads() {
  host::wait(host::At::kBarrier);
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  return host::warp(host::At::kBallot, predicate, [](const int* lane) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(lane[i]) << i;
    return bits;
  });
}

inline int __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

inline int __reduce_add_sync(unsigned, int value) {
  return host::warp(host::At::kSum, value, [](const int* lane) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += lane[i];
    return sum;
  });
}

inline int __reduce_min_sync(unsigned, int value) {
  return host::warp(host::At::kSum, value, [](const int* lane) { return *std::min_element(lane, lane + 32); });
}
inline int __reduce_max_sync(unsigned, int value) {
  return host::warp(host::At::kSum, value, [](const int* lane) { return *std::max_element(lane, lane + 32); });
}

// the value of the lane that `source` makes of one's own number
template <typename T, typename Source>
T shuffle_on_host(T value, Source source) {
  static_assert(sizeof(T) == sizeof(int), "32 bits");
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const int from = source(static_cast<int>(threadIdx.x % 32));
  bits = host::warp(host::At::kShuffle, bits, [&](const int* lane) { return lane[from]; });
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return shuffle_on_host(value, [=](int) { return lane; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle_on_host(value, [=](int lane) { return lane ^ mask; });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  return shuffle_on_host(value, [=](int lane) { return lane + step < 32 ? lane + step : lane; });
}

inline int __ffs(unsigned x) {
  return __builtin_ffs(static_cast<int>(x));
}

inline int atomicAdd(int* word, int value) {
  const int before = *word;
  *word += value;
  return before;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}

inline unsigned __vcmpeq4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    if (((a >> shift) & 0xff) == ((b >> shift) & 0xff)) result |= 0xffu << shift;
  }
  return result;
}

inline int atomicOr(int* word, int bits) {
  const int before = *word;
  *word |= bits;
  return before;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, const T& x) {
  *to = x;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}

inline float __fdividef(float a, float b) {
  return a / b;
}
#define __expf(x) std::exp(x)
