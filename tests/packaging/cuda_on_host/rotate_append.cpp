// The extension with its kernels run on the host: the real bindings, plan and kernel source, a stand-in for the launch.
#include "cuda_on_host.h"

#include "incremental_prefill/plan.h"
#include "rotate_append/kernel.cuh"
#include "streamkernels/error.h"
#include "streamkernels/runtime.h"

// of the machine that plans are made for
int processors = 132;

namespace {

template <typename Element>
auto choose(bool vectors, bool interleaved) {
  using namespace sk::rotate_append;
  constexpr int kWidth = 16 / sizeof(Element);
  if (!vectors) return interleaved ? rotate_append_kernel<Element, 1, true> : rotate_append_kernel<Element, 1, false>;
  return interleaved ? rotate_append_kernel<Element, kWidth, true> : rotate_append_kernel<Element, kWidth, false>;
}

}  // namespace

namespace sk {

std::string unavailable_reason(int) {
  return "";
}
std::string toolkit_version() {
  return "host";
}

uint64_t capture_id(uintptr_t) {
  return 0;
}

namespace incremental_prefill {

// the kernel itself needs tensor cores; what it is launched with, and what it plans with, is tested
struct Launched {
  Params params;
  int dtype, device;
  uintptr_t stream;
};
Launched last;

const char* refusal(const Params&, DType, int) {
  return nullptr;
}
Workspace workspace(const Params&, DType, int) {
  return {1, 1};
}
void launch(const Params& p, DType dtype, int device, uintptr_t stream) {
  last = {p, static_cast<int>(dtype), device, stream};
}
void preload(int) {}

}  // namespace incremental_prefill

namespace rotate_append {

void preload(int) {}

void launch(const Params& p, DType dtype, int, uintptr_t) {
  if (p.B == 0 || p.HK == 0 || p.T == 0) return;
  const int width = access_width(p, size_of(dtype));
  const Plan plan = make_plan(p, width, size_of(dtype), processors);
  const auto kernel = dtype == DType::kFloat32   ? choose<float>(width > 1, p.interleaved)
                      : dtype == DType::kFloat16 ? choose<Float16>(width > 1, p.interleaved)
                                                 : choose<BFloat16>(width > 1, p.interleaved);
  host::launch(kernel, static_cast<unsigned>(plan.blocks), plan.threads, p, plan);
}

}  // namespace rotate_append
}  // namespace sk

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT const void* last_prefill() {
  return &sk::incremental_prefill::last;
}

EXPORT void set_processors(int count) {
  processors = count;
}

EXPORT int slot_of(int64_t index, int capacity, int sinks, bool bounded) {
  return sk::slot_of(index, capacity, sinks, bounded);
}

// threads, rows, heads, tiles, groups, blocks of a call with aligned tensors
EXPORT void plan_of(int B, int HK, int T, int D, int width, int element_size, bool roles, int64_t* out) {
  sk::rotate_append::Params p{};
  const int8_t role = 0;
  p.B = B;
  p.HK = HK;
  p.T = T;
  p.D = D;
  p.role = roles ? &role : nullptr;
  const auto plan = sk::rotate_append::make_plan(p, width, element_size, processors);
  const int64_t all[] = {plan.threads, plan.rows, plan.heads, plan.tiles, plan.groups, plan.blocks};
  std::copy(std::begin(all), std::end(all), out);
}

// The plan of one session of incremental_prefill, a segment at a time. in: per segment (capacity, sinks, window), then
// ring_sinks, the lengths, T, keys of a tile; rows: per row (role, limit, source begin, target begin). out: per segment
// (total, held, lowest, end, sinks) and (sink tiles, first tile, tiles), then the steps; sights: per row (begin, end)
// of the source and of the target.
EXPORT void session_of(const int* in, const int* rows, int* out, int* sights) {
  using namespace sk::incremental_prefill;
  Params p{};
  for (int s = 0; s < 2; ++s) {
    p.segments[s].capacity = in[3 * s];
    p.segments[s].sinks = in[3 * s + 1];
    p.segments[s].window = in[3 * s + 2];
  }
  p.ring_sinks = in[6];
  p.T = in[9];
  Census census = no_rows();
  for (int t = 0; t < p.T; ++t) count_row(census, rows[4 * t], rows[4 * t + 2], rows[4 * t + 3], rows[4 * t + 1]);
  const Session session = session_of(p, census, in[7], in[8], in[10]);
  for (int s = 0; s < 2; ++s) {
    const View& v = session.views[s];
    const Tiles& t = session.tiles[s];
    const int all[] = {v.total, v.held, v.lowest, v.end, v.sinks, t.sinks, t.first, t.tiles};
    out = std::copy(std::begin(all), std::end(all), out);
  }
  *out = steps_of(session, p.T, in[10]);
  int ranks[2] = {0, 0};
  for (int t = 0; t < p.T; ++t) {
    const int* row = rows + 4 * t;
    const bool target = row[0] == sk::kTarget;
    const int own = session.views[target].length + (row[0] == 0 || row[0] == 1 ? ranks[target]++ : 0);
    const Sight a = source_sight(session.views[0], p.segments[0].window, row[0], own, row[2], row[1]);
    const Sight b = target_sight(session.views[1], p.segments[1].window, row[0], own, row[3]);
    const int both[] = {a.begin, a.end, b.begin, b.end};
    sights = std::copy(std::begin(both), std::end(both), sights);
  }
}

// The same session by the short way of rows that all belong to `segment` and see all before them. out as above, without
// the sights.
EXPORT void plain_session_of(const int* in, int segment, int* out) {
  using namespace sk::incremental_prefill;
  Params p{};
  for (int s = 0; s < 2; ++s) {
    p.segments[s].capacity = in[3 * s];
    p.segments[s].sinks = in[3 * s + 1];
  }
  p.T = in[9];
  const int length[] = {in[7], in[8]};
  const Session session = plain_session(p, segment, p.T, length, in[10]);
  for (int s = 0; s < 2; ++s) {
    const View& v = session.views[s];
    const Tiles& t = session.tiles[s];
    const int all[] = {v.total, v.held, v.lowest, v.end, v.sinks, t.sinks, t.first, t.tiles};
    out = std::copy(std::begin(all), std::end(all), out);
  }
  *out = steps_of(session, p.T, in[10]);
}

// part i of 2^log of [begin, end), beside new rows or not
EXPORT void part_of(int begin, int end, int i, int log, bool fresh, int* out) {
  using namespace sk::incremental_prefill;
  const Range r = fresh ? beside_fresh({begin, end}, i, log) : part_of({begin, end}, i, log);
  out[0] = r.begin;
  out[1] = r.end;
}

// part i of n of [begin, end), beside one more step or not
EXPORT void cut_of(int begin, int end, int i, int n, bool fresh, int* out) {
  const auto r = sk::incremental_prefill::cut({begin, end}, i, n, sk::incremental_prefill::reciprocal(n), fresh);
  out[0] = r.begin;
  out[1] = r.end;
}

// steps of an item and of a share when `items` of `steps` are alike, for workers of `blocks`
EXPORT void shares_of(int items, int steps, int workers, int smallest, int blocks, int* out) {
  const auto s = sk::incremental_prefill::even_shares(items, steps, workers, workers / items, smallest, blocks);
  out[0] = s.per_item;
  out[1] = s.share;
}
}
