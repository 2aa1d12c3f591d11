#include "span_attention/hopper/backward.h"

#include <algorithm>
#include <mutex>

#include "span_attention/hopper/backward_plan.h"
#include "span_attention/hopper/dkdv/kernel.cuh"
#include "span_attention/hopper/dq/kernel.cuh"
#include "span_attention/hopper/maps.h"

namespace sk::span_attention::hopper {
namespace {

constexpr int kMaxDevices = 64;
using Queries = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, Call, dq::Inputs);
using Keys = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, dkdv::Call);

struct Instance {
  Queries queries;
  Keys keys;
  int shared[2];
};
template <typename Element, int D>
Instance instance_of() {
  using A = dq::Shape<Element, D>;
  using B = dkdv::Shape<Element, D>;
  return {dq::dq_kernel<A>, dkdv::dkdv_kernel<B>, {A::kShared, B::kShared}};
}
template <typename Element>
Instance choose(int D) {
  return D == 64 ? instance_of<Element, 64>() : instance_of<Element, 128>();
}
Instance choose(DType dtype, int D) {
  return dtype == DType::kFloat16 ? choose<Float16>(D) : choose<BFloat16>(D);
}

}  // namespace

void preload_backward(int device) {
  static std::once_flag allowed[kMaxDevices];
  if (!here(device)) return;
  std::call_once(allowed[device], [device] {
    const DeviceGuard guard(device);
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (const int D : {64, 128}) {
        const Instance i = choose(dtype, D);
        check(cudaFuncSetAttribute(i.queries, cudaFuncAttributeMaxDynamicSharedMemorySize, i.shared[0]),
              "span_attention: asking for shared memory");
        check(cudaFuncSetAttribute(i.keys, cudaFuncAttributeMaxDynamicSharedMemorySize, i.shared[1]),
              "span_attention: asking for shared memory");
      }
    }
  });
}

Work work_of(int B, int H, int HK, int T, int S, int D, int device) {
  return work_of(Cut(B, H, HK, T, S, multiprocessors(device)), B, H, HK, D);
}

void launch(const Backward& x, DType dtype, int device, uintptr_t stream) {
  const Params& p = x.p;
  if (p.B == 0 || p.H == 0 || p.T == 0) return;
  if (const char* why = refuses(p, device)) throw NotSupported(why);
  preload_backward(device);
  const DeviceGuard guard(device);
  const Instance instance = choose(dtype, p.D);
  const int processors = multiprocessors(device);
  const Cut cut(p.B, p.H, p.HK, p.T, p.S, processors);
  const auto q = [&](int box) { return map_of(p.q, dtype, p.B, p.H, p.T, p.D, box); };
  const auto dout = [&](int box) { return map_of(x.dout, dtype, p.B, p.H, p.T, p.D, box); };
  const auto k = [&](int box) { return map_of(p.k, dtype, p.B, p.HK, p.S, p.D, box); };
  const auto v = [&](int box) { return map_of(p.v, dtype, p.B, p.HK, p.S, p.D, box); };

  const Call c = make_call(p, x.tickets);
  launch_overlapped("span_attention: dq", instance.queries, std::min(c.items, processors), kThreads, instance.shared[0],
                    device, stream, q(128), dout(128), k(64), v(64),
                    map_of_rows_first(x.dq, dtype, p.B, p.H, p.T, p.D, 16), c, inputs_of(x, cut));

  const dkdv::Call d = call_of(x, cut);
  launch_overlapped("span_attention: dk and dv", instance.keys, std::min(d.items, processors), kThreads,
                    instance.shared[1], device, stream, q(64), dout(64), k(128), v(128),
                    map_of_rows_first(x.dk, dtype, p.B, p.HK, p.S, p.D, 16),
                    map_of_rows_first(x.dv, dtype, p.B, p.HK, p.S, p.D, 16), d);
}

}  // namespace sk::span_attention::hopper
