// span_attention's kernel for many rows run on the host: its own source but for ptx.cuh, barrier.cuh and wgmma.cuh.
#include "hopper_on_host.h"

#include "span_attention/hopper/kernel.cuh"

namespace {
constexpr int kProcessors = 2;
unsigned seed;
host::Pace pace = host::Pace::kAtOnce;
}  // namespace

// 0: what is begun happens at once; 1: as late as it may; 2: any time between
extern "C" __attribute__((visibility("default"))) void set_pace(int how, unsigned from) {
  pace = static_cast<host::Pace>(how), seed = from;
}

namespace sk::span_attention::hopper {

namespace {

CUtensorMap map_of(const Rows& x, int heads, int rows, const Params& p, int box) {
  return {static_cast<char*>(x.data), {2, 2 * x.row, 2 * x.head, 2 * x.batch}, {p.D, rows, heads, p.B}, box};
}

template <class S>
void run(const Params& p, const Call& c) {
  static_assert(S::kShared <= host::kMemory, "");
  const int64_t row = int64_t{p.H} * p.D;
  const CUtensorMap q = map_of(p.q, p.H, p.T, p, kRows), k = map_of(p.k, p.HK, p.S, p, S::kKeys),
                    v = map_of(p.v, p.HK, p.S, p, S::kKeys), o = map_of({p.o, p.T * row, p.D, row}, p.H, p.T, p, 16);
  const unsigned blocks = static_cast<unsigned>(std::min(c.items, kProcessors));
  // one after the other: the first one takes what the others do not begin with
  for (unsigned block = 0; block < blocks; ++block) {
    host::prepare(seed + block, pace);
    host::launch_one(attend_kernel<S>, block, blocks, kThreads, q, k, v, o, c);
    host::tidy_up();
  }
}

template <typename Element>
void run_of(const Params& p, const Call& c) {
  p.D == 64 ? run<Shape<Element, 64>>(p, c) : run<Shape<Element, 128>>(p, c);
}

}  // namespace

bool here(int) {
  return true;
}
void preload(int) {}

void launch(const Params& p, int* tickets, DType dtype, int, uintptr_t) {
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  const Call c = make_call(p, tickets);
  dtype == DType::kFloat16 ? run_of<Float16>(p, c) : run_of<BFloat16>(p, c);
}

}  // namespace sk::span_attention::hopper
