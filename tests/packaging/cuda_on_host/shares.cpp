// Blocks that share out rows (plain/shares.cuh), run on the host: each is a fiber that may lose its turn at every
// access to the counter. Memory order is not seen.
#include "cuda_on_host.h"

#include <random>

namespace {

struct Block {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[host::kStack]};
  uint32_t own = 0;
  bool ended = false;
};
std::vector<Block> blocks;
ucontext_t turns;
size_t running;
long long ticks;

void lose_turn() {
  swapcontext(&blocks[running].context, &turns);
}
uint32_t atomicAdd(uint32_t* word, uint32_t value) {
  lose_turn();
  const uint32_t before = *word;
  *word += value;
  return before;
}
uint32_t atomicCAS(uint32_t* word, uint32_t expected, uint32_t value) {
  lose_turn();
  const uint32_t before = *word;
  if (before == expected) *word = value;
  return before;
}
long long clock64() {
  return ticks;
}

}  // namespace

namespace sk::incremental_prefill {

static uint32_t count_in(uint32_t* counter) {
  return atomicAdd(counter, 1);
}
static uint32_t look_at(const uint32_t* counter) {
  lose_turn();
  return *counter;
}

}  // namespace sk::incremental_prefill

#include "incremental_prefill/plain/shares.cuh"

namespace {

struct Call {
  uint32_t counter;
  int parts, shares, patience;
} call;

void enter() {
  Block& block = blocks[running];
  block.own = sk::incremental_prefill::take_shares(&call.counter, call.parts, call.shares, call.patience);
  block.ended = true;
  lose_turn();
}

}  // namespace

// What each of `parts` blocks takes, in random turns; the last `late` of them begin when the others have ended. Returns
// the counter, or -1 if it takes too long.
extern "C" __attribute__((visibility("default"))) int64_t share_out(int parts, int shares, int patience, int late,
                                                                    unsigned seed, uint32_t* taken) {
  std::mt19937 random(seed);
  call = {0, parts, shares, patience};
  ticks = 0;
  blocks = std::vector<Block>(parts);
  for (Block& block : blocks) {
    getcontext(&block.context);
    block.context.uc_stack.ss_sp = block.stack.get();
    block.context.uc_stack.ss_size = host::kStack;
    makecontext(&block.context, enter, 0);
  }
  for (;;) {
    std::vector<size_t> ready;
    for (int i = 0; i < parts; ++i) {
      if (i == parts - late && !ready.empty()) break;
      if (!blocks[i].ended) ready.push_back(i);
    }
    if (ready.empty()) break;
    if (++ticks > 100000) return -1;
    running = ready[random() % ready.size()];
    swapcontext(&turns, &blocks[running].context);
  }
  for (int i = 0; i < parts; ++i) taken[i] = blocks[i].own;
  return call.counter;
}
