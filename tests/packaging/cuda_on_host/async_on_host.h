// On the host: what goes on beside a block's threads. Copies and products of warpgroups come about some time between
// their beginning and the moment that somebody has waited for them, chosen anew by each run; so does the order of
// warps.
#pragma once

#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <utility>

#include "cuda_on_host.h"
#include "streamkernels/numbers.cuh"

namespace host {

constexpr int kMemory = 227 * 1024, kMostThreads = 384;
alignas(1024) static char memory[kMemory];
static std::mt19937 chance;
enum class Pace { kAtOnce, kLate, kAnyTime };
static Pace pace;

static bool now() {
  return pace == Pace::kAtOnce || (pace == Pace::kAnyTime && chance() % 4 == 0);
}

struct Barrier {
  int arrivals = 0, missing = 0, bytes = 0;
  unsigned phase = 0;
  void check() {
    if (missing != 0 || bytes != 0) return;
    ++phase, missing = arrivals;
  }
};
static std::map<uint32_t, Barrier> barriers;
struct Named {
  int arrived = 0;
  unsigned round = 0;
};
static std::map<int, Named> named;

// copies under way, and by whom those are that somebody waits for
struct Copy {
  int thread;  // -1: a barrier is told
  std::function<void()> run;
};
static std::vector<Copy> copies;

static bool some_copies() {
  bool any = false;
  for (size_t n = 0; n < copies.size();) {
    // late ones to shared memory come when nothing else goes on; stores only when somebody waits for them
    const bool go = copies[n].thread < 0 ? pace != Pace::kAnyTime || chance() % 8 == 0 : now();
    if (!go) {
      ++n;
      continue;
    }
    const auto run = copies[n].run;
    copies.erase(copies.begin() + static_cast<long>(n));
    run();
    any = true;
    if (pace == Pace::kLate) break;
  }
  return any;
}
static void finish_copies_of(int thread) {
  for (size_t n = 0; n < copies.size();) {
    if (copies[n].thread != thread) {
      ++n;
      continue;
    }
    const auto run = copies[n].run;
    copies.erase(copies.begin() + static_cast<long>(n));
    run();
  }
}

// products that a thread has begun, by groups; the last one is open
static std::vector<std::vector<std::function<void()>>> products[kMostThreads];

static void finish_groups(size_t left) {
  auto& groups = products[threadIdx.x];
  while (groups.size() > left) {
    for (auto& run : groups.front()) run();
    groups.erase(groups.begin());
  }
}

// Others go on meanwhile.
static void pause() {
  for (int rounds = pace == Pace::kAtOnce ? 0 : 8; rounds > 0; --rounds) {
    bool looked = false;
    look_until([&looked] { return std::exchange(looked, true); }, "the next round", 0);
  }
}

static unsigned seed_of_products;
static unsigned closed[kMostThreads];  // groups so far

static void prepare(unsigned seed, Pace how) {
  chance.seed(seed);
  seed_of_products = seed;
  std::fill(closed, closed + kMostThreads, 0);
  pace = how;
  std::memset(memory, 0xff, sizeof(memory));
  barriers.clear(), named.clear(), copies.clear();
  for (auto& groups : products) groups.clear();
  meanwhile = some_copies;
  // a rotation, which changes rarely: some warps run ahead
  turn_of = [](unsigned n, unsigned warps) {
    static unsigned shift = 0;
    if (n == 0 && chance() % 8 == 0) shift = chance() % warps;
    return (n + shift) % warps;
  };
}
static void tidy_up() {
  if (!copies.empty()) {
    std::fprintf(stderr, "a block ended with copies under way\n");
    std::abort();
  }
  meanwhile = [] { return false; };
  turn_of = [](unsigned n, unsigned) { return n; };
}

// where the 16-byte chunk at `address` lies with a 128-byte swizzle
static char* swizzled(uint32_t address) {
  return memory + (address ^ (address >> 7 & 7) << 4);
}
template <typename Element>
float number(uint32_t address) {
  Element x;
  std::memcpy(&x, swizzled(address & ~15u) + address % 16, sizeof(x));
  return sk::to_float(x);
}

}  // namespace host
