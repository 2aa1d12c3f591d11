// On the host: Hopper's instructions, as streamkernels/barrier.cuh, mma.cuh and wgmma.cuh and
// span_attention/hopper/ptx.cuh have them. What products have not written yet is NaN.
#pragma once

#include <climits>

#include "async_on_host.h"
#include "streamkernels/numbers.cuh"
#include "streamkernels/softmax.cuh"

#define SK_WGMMA 1

// of a tensor [B, heads, rows, D], 16 bits each
struct CUtensorMap {
  char* data;
  int64_t strides[4];  // in bytes: columns, rows, heads, B
  int sizes[4], rows;  // and the rows of a box
};

static inline void __syncwarp() {
  __shfl_sync(~0u, 0, 0);
}

namespace sk {

// --- mma.cuh, barrier.cuh, wgmma.cuh ---
static inline uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(static_cast<const char*>(x) - host::memory);
}
template <typename Element>
static uint32_t pack(float first, float second) {
  Element x[2];
  from_float(first, x[0]);
  from_float(second, x[1]);
  uint32_t bits;
  std::memcpy(&bits, x, sizeof(bits));
  return bits;
}
static inline float exp2_fast(float x) {
  return std::exp2(x);
}
static inline float log2_fast(float x) {
  return std::log2(x);
}

static inline void barrier_init(uint32_t barrier, int arrivals) {
  host::barriers[barrier] = {arrivals, arrivals, 0, 0};
}
static inline void barriers_init(uint32_t first, int count, int arrivals) {
  for (int n = 0; n < count; ++n) barrier_init(first + 8 * static_cast<uint32_t>(n), arrivals);
}
static inline void barrier_publish() {}
static inline void barrier_arrive(uint32_t barrier) {
  host::Barrier& b = host::barriers.at(barrier);
  if (b.missing == 0) {
    std::fprintf(stderr, "too many threads arrive at the barrier at %u\n", barrier);
    std::abort();
  }
  --b.missing;
  b.check();
}
static inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  host::barriers.at(barrier).bytes += static_cast<int>(bytes);
  barrier_arrive(barrier);
}
static inline void barrier_wait(uint32_t barrier, uint32_t phase) {
  host::look_until([=] { return (host::barriers.at(barrier).phase & 1) != phase; }, "the barrier at", barrier);
}

static inline uint32_t low_word(uint32_t from, uint32_t) {
  return static_cast<uint32_t>(__shfl_sync(~0u, from, 0));
}
static inline void open_products() {}
static inline void publish() {}
static inline std::vector<std::function<void()>>& open_group() {
  auto& groups = host::products[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  return groups.back();
}
static inline void close_products() {
  open_group();
  host::products[threadIdx.x].emplace_back();
  // all threads of a warp multiply at the same time
  const unsigned n = host::closed[threadIdx.x]++;
  const bool early = std::mt19937(host::seed_of_products + 977 * n + threadIdx.x / 32)() % 2 == 0;
  if (host::pace == host::Pace::kAtOnce || (host::pace == host::Pace::kAnyTime && early)) host::finish_groups(1);
}
template <int N>
static void wait_products() {
  host::pause();
  host::finish_groups(N + 1);
}

static inline void finish_products() {
  close_products();
  wait_products<0>();
}

}  // namespace sk

#include "streamkernels/rows_softmax.cuh"

namespace sk {

// a row of 64 columns is 128 bytes, and panels of `rows` of them follow one another
static inline uint32_t element_at(uint32_t from, int rows, int row, int column) {
  return from + static_cast<uint32_t>(column / 64 * rows * 128 + row * 128 + column % 64 * 2);
}

template <class S, int KEYS>
static void begin_scores(float (&s)[KEYS / 8][4], uint32_t q, uint32_t k) {
  for (auto& some : s) {
    for (float& x : some) x = NAN;
  }
  open_group().push_back([&s, q, k] {
    const int lane = static_cast<int>(threadIdx.x % 32), row = static_cast<int>(threadIdx.x / 32 % 4 * 16) + lane / 4;
    float rows[2][S::D];
    for (int i = 0; i < 2; ++i) {
      for (int d = 0; d < S::D; ++d) {
        rows[i][d] = host::number<typename S::Element>(element_at(q, S::kRows, row + 8 * i, d));
      }
    }
    for (int n = 0; n < KEYS / 8; ++n) {
      for (int j = 0; j < 2; ++j) {
        float sum[2] = {0.f, 0.f};
        for (int d = 0; d < S::D; ++d) {
          const float x = host::number<typename S::Element>(element_at(k, S::kKeys, 8 * n + lane % 4 * 2 + j, d));
          sum[0] += rows[0][d] * x, sum[1] += rows[1][d] * x;
        }
        s[n][j] = sum[0], s[n][2 + j] = sum[1];
      }
    }
  });
}

template <class S, int KEYS>
static void begin_values(State<S>& state, const uint32_t (&p)[KEYS / 16][4], uint32_t v) {
  open_group().push_back([&state, &p, v] {
    static uint32_t brought[host::kMostThreads][KEYS / 16][4];
    std::memcpy(brought[threadIdx.x], p, sizeof(p));
    __shfl_sync(~0u, 0, 0);
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane % 4;
    float weights[2][KEYS];
    for (int n = 0; n < KEYS / 16; ++n) {
      for (unsigned c = 0; c < 4; ++c) {
        for (int i = 0; i < 4; ++i) {
          typename S::Element two[2];
          std::memcpy(two, &brought[first + c][n][i], sizeof(two));
          for (unsigned j = 0; j < 2; ++j) {
            weights[i % 2][16 * n + i / 2 * 8 + static_cast<int>(2 * c + j)] = to_float(two[j]);
          }
        }
      }
    }
    __shfl_sync(~0u, 0, 0);
    for (int n = 0; n < S::D / 8; ++n) {
      for (int j = 0; j < 2; ++j) {
        float sum[2] = {0.f, 0.f};
        for (int key = 0; key < KEYS; ++key) {
          const float x = host::number<typename S::Element>(
              element_at(v, S::kKeys, key, 8 * n + static_cast<int>(lane % 4) * 2 + j));
          sum[0] += weights[0][key] * x, sum[1] += weights[1][key] * x;
        }
        state.o[n][j] += sum[0], state.o[n][2 + j] += sum[1];
      }
    }
  });
}

// --- span_attention/hopper/ptx.cuh ---
namespace span_attention::hopper {

static inline char* dynamic_memory() {
  return host::memory;
}

// every number of a box: where it lies in shared memory, and in the tensor, or null outside of it
template <typename Each>
static void for_box(const CUtensorMap& map, uint32_t at, int column, int row, int head, int b, Each each) {
  for (int r = 0; r < map.rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int64_t places[4] = {column + c, row + r, head, b};
      char* element = map.data;
      for (int n = 0; n < 4; ++n) {
        if (places[n] >= 0 && places[n] < map.sizes[n]) {
          if (element != nullptr) element += places[n] * map.strides[n];
        } else {
          element = nullptr;
        }
      }
      const uint32_t address = at + static_cast<uint32_t>(r * 128 + c * 2);
      each(host::swizzled(address & ~15u) + address % 16, element);
    }
  }
}
static inline void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int head,
                            int b) {
  host::copies.push_back({-1, [=] {
                            for_box(*map, to, column, row, head, b, [](char* shared, const char* element) {
                              if (element == nullptr) {
                                std::memset(shared, 0, 2);
                              } else {
                                std::memcpy(shared, element, 2);
                              }
                            });
                            host::Barrier& told = host::barriers.at(barrier);
                            told.bytes -= map->rows * 128;
                            told.check();
                          }});
}
static inline void store_box(const CUtensorMap* map, uint32_t from, int column, int row, int head, int b) {
  host::copies.push_back({static_cast<int>(threadIdx.x), [=] {
                            for_box(*map, from, column, row, head, b, [](const char* shared, char* element) {
                              if (element != nullptr) std::memcpy(element, shared, 2);
                            });
                          }});
}
static inline void close_stores() {}
static inline void wait_until_read() {
  host::pause();
  host::finish_copies_of(static_cast<int>(threadIdx.x));
}
static inline void prefetch_map(const CUtensorMap*) {}

static inline void store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t at = __shfl_sync(~0u, row, matrix * 8 + lane / 4);
    std::memcpy(host::memory + at + lane % 4 * 4, &x[matrix], 4);
  }
  __shfl_sync(~0u, 0, 0);
}

template <int THREADS>
static void meet(int barrier) {
  host::Named& b = host::named[barrier];
  const unsigned round = b.round;
  if (++b.arrived == THREADS) b.arrived = 0, ++b.round;
  host::look_until([&b, round] { return b.round != round; }, "barrier", static_cast<unsigned>(barrier));
}
template <int FEWER>
static void hand_in_registers() {}
template <int MORE>
static void take_registers() {}
static inline uint32_t apart(uint32_t x) {
  return x;
}

}  // namespace span_attention::hopper
}  // namespace sk
