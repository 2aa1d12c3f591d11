// span_attention at the border to Python.
#pragma once

#include "span_attention/hopper/backward.h"
#include "span_attention/hopper/params.h"
#include "span_attention/params.h"
#include "streamkernels/border.h"

namespace sk::span_attention {

inline Params params_of(Rows q, Rows k, Rows v, uintptr_t o, uintptr_t lse, uintptr_t bounds, Table sink_key, Rows kept,
                        Table kept_count, uintptr_t sink_logits, bool sink_logits_fp32, int B, int H, int HK, int T,
                        int S, int D, int N, int K, const pybind11::tuple& rules, double scale, double softcap,
                        int dtype) {
  border::require(B >= 0 && HK >= 1 && T >= 0 && S >= 0 && K >= 0 && H % HK == 0,
                  "span_attention: q: expected sizes >= 0 and H a multiple of HK");
  border::require(N >= 1 && N <= kMaxSlots && static_cast<int>(rules.size()) == N,
                  "span_attention: rules: expected one rule for each of at most 8 slots");
  border::require(dtype == static_cast<int>(DType::kFloat16) || dtype == static_cast<int>(DType::kBFloat16),
                  "span_attention: q: expected float16 or bfloat16");
  border::require(scale > 0 && softcap >= 0, "span_attention: scale: expected a number > 0");
  border::require(aligned(q, 2) && aligned(k, 2) && aligned(v, 2),
                  "span_attention: q: expected rows on 16-byte borders");
  const bool some = B && H && T;
  border::require(!some || (q.data && o && lse && bounds && (S == 0 || (k.data && v.data))),
                  "span_attention: q: expected no null pointer");
  Params p{};
  p.q = q;
  p.k = k;
  p.v = v;
  p.o = border::address(o);
  p.lse = static_cast<float*>(border::address(lse));
  p.bounds = static_cast<const int32_t*>(border::address(bounds));
  p.sink_key = sink_key;
  p.kept = kept;
  p.kept_count = kept_count;
  p.sink_logits = border::address(sink_logits);
  p.sink_logits_fp32 = sink_logits_fp32;
  p.B = B;
  p.H = H;
  p.HK = HK;
  p.T = T;
  p.S = S;
  p.D = D;
  p.N = N;
  p.K = kept.data == nullptr ? 0 : K;
  for (int n = 0; n < N; ++n) {
    const int rule = rules[n].cast<int>();
    border::require(rule >= kAttend && rule <= kKept, "span_attention: rules: expected rules 0 to 3");
    p.rules[n] = static_cast<Rule>(rule);
  }
  p.scale = scale;
  p.softcap = softcap;
  return p;
}

inline void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "span_attention_splits",
      [](Rows q, Rows k, Rows v, uintptr_t o, uintptr_t lse, uintptr_t bounds, Table sink_key, Rows kept,
         Table kept_count, uintptr_t sink_logits, bool sink_logits_fp32, int B, int H, int HK, int T, int S, int D,
         int N, int K, const pybind11::tuple& rules, double scale, double softcap, int dtype, int device) {
        return splits(params_of(q, k, v, o, lse, bounds, sink_key, kept, kept_count, sink_logits, sink_logits_fp32, B,
                                H, HK, T, S, D, N, K, rules, scale, softcap, dtype),
                      device);
      },
      "q"_a, "k"_a, "v"_a, "o"_a, "lse"_a, "bounds"_a, "sink_key"_a, "kept"_a, "kept_count"_a, "sink_logits"_a,
      "sink_logits_fp32"_a, "B"_a, "H"_a, "HK"_a, "T"_a, "S"_a, "D"_a, "N"_a, "K"_a, "rules"_a, "scale"_a, "softcap"_a,
      "dtype"_a, "device"_a);
  m.def(
      "span_attention",
      [](Rows q, Rows k, Rows v, uintptr_t o, uintptr_t lse, uintptr_t bounds, Table sink_key, Rows kept,
         Table kept_count, uintptr_t sink_logits, bool sink_logits_fp32, int B, int H, int HK, int T, int S, int D,
         int N, int K, const pybind11::tuple& rules, double scale, double softcap, int dtype, int device,
         uintptr_t room, int splits, uintptr_t stream) {
        Params p = params_of(q, k, v, o, lse, bounds, sink_key, kept, kept_count, sink_logits, sink_logits_fp32, B, H,
                             HK, T, S, D, N, K, rules, scale, softcap, dtype);
        border::require(splits >= 1 && (splits == 1 || room), "span_attention: room: expected no null pointer");
        p.partial = static_cast<float*>(border::address(room));
        p.parts = p.partial == nullptr ? nullptr : p.partial + static_cast<int64_t>(splits) * B * H * T * D;
        launch(p, splits, static_cast<DType>(dtype), device, stream);
      },
      "q"_a, "k"_a, "v"_a, "o"_a, "lse"_a, "bounds"_a, "sink_key"_a, "kept"_a, "kept_count"_a, "sink_logits"_a,
      "sink_logits_fp32"_a, "B"_a, "H"_a, "HK"_a, "T"_a, "S"_a, "D"_a, "N"_a, "K"_a, "rules"_a, "scale"_a, "softcap"_a,
      "dtype"_a, "device"_a, "room"_a, "splits"_a, "stream"_a);
  m.def("span_attention_many_here", &hopper::here, "device"_a);
  m.def(
      "span_attention_many",
      [](Rows q, Rows k, Rows v, uintptr_t o, uintptr_t lse, uintptr_t bounds, Table sink_key, Rows kept,
         Table kept_count, uintptr_t sink_logits, bool sink_logits_fp32, int B, int H, int HK, int T, int S, int D,
         int N, int K, const pybind11::tuple& rules, double scale, double softcap, int dtype, int device,
         uintptr_t tickets, uintptr_t stream) {
        const Params p = params_of(q, k, v, o, lse, bounds, sink_key, kept, kept_count, sink_logits, sink_logits_fp32,
                                   B, H, HK, T, S, D, N, K, rules, scale, softcap, dtype);
        border::require(tickets, "span_attention: tickets: expected no null pointer");
        hopper::launch(p, static_cast<int*>(border::address(tickets)), static_cast<DType>(dtype), device, stream);
      },
      "q"_a, "k"_a, "v"_a, "o"_a, "lse"_a, "bounds"_a, "sink_key"_a, "kept"_a, "kept_count"_a, "sink_logits"_a,
      "sink_logits_fp32"_a, "B"_a, "H"_a, "HK"_a, "T"_a, "S"_a, "D"_a, "N"_a, "K"_a, "rules"_a, "scale"_a, "softcap"_a,
      "dtype"_a, "device"_a, "tickets"_a, "stream"_a);
  m.def(
      "span_attention_many_work",
      [](int B, int H, int HK, int T, int S, int D, int device) {
        border::require(B >= 1 && HK >= 1 && H >= HK && T >= 1 && S >= 1, "span_attention: q: expected sizes >= 1");
        const hopper::Work work = hopper::work_of(B, H, HK, T, S, D, device);
        return pybind11::make_tuple(work.floats, work.counters);
      },
      "B"_a, "H"_a, "HK"_a, "T"_a, "S"_a, "D"_a, "device"_a);
  m.def(
      "span_attention_many_backward",
      [](Rows q, Rows k, Rows v, Rows o, Rows dout, uintptr_t lse, uintptr_t dlse, uintptr_t bounds,
         uintptr_t row_blocks, uintptr_t key_blocks, uintptr_t sink_logits, bool sink_logits_fp32, uintptr_t dq,
         uintptr_t dk, uintptr_t dv, uintptr_t sink_gradient, int B, int H, int HK, int T, int S, int D, int N,
         const pybind11::tuple& rules, double scale, double softcap, int dtype, int device, uintptr_t work,
         uintptr_t tickets, uintptr_t counters, uintptr_t stream) {
        hopper::Backward x{};
        x.p = params_of(q, k, v, dq, lse, bounds, {}, {}, {}, sink_logits, sink_logits_fp32, B, H, HK, T, S, D, N, 0,
                        rules, scale, softcap, dtype);
        border::require(aligned(o, 2) && aligned(dout, 2), "span_attention: do: expected rows on 16-byte borders");
        border::require(o.data && dout.data && row_blocks && key_blocks && dk && dv && work && tickets && counters,
                        "span_attention: do: expected no null pointer");
        border::require((sink_gradient != 0) == (sink_logits != 0),
                        "span_attention: sink_gradient: expected one exactly if there are sink logits");
        x.o = o, x.dout = dout;
        x.dlse = static_cast<const float*>(border::address(dlse));
        x.sink_gradient = static_cast<float*>(border::address(sink_gradient));
        x.dq = border::address(dq), x.dk = border::address(dk), x.dv = border::address(dv);
        x.row_blocks = static_cast<const int32_t*>(border::address(row_blocks));
        x.key_blocks = static_cast<const int32_t*>(border::address(key_blocks));
        x.work = static_cast<float*>(border::address(work));
        x.tickets = static_cast<int*>(border::address(tickets));
        x.counters = static_cast<int*>(border::address(counters));
        hopper::launch(x, static_cast<DType>(dtype), device, stream);
      },
      "q"_a, "k"_a, "v"_a, "o"_a, "dout"_a, "lse"_a, "dlse"_a, "bounds"_a, "row_blocks"_a, "key_blocks"_a,
      "sink_logits"_a, "sink_logits_fp32"_a, "dq"_a, "dk"_a, "dv"_a, "sink_gradient"_a, "B"_a, "H"_a, "HK"_a, "T"_a,
      "S"_a, "D"_a, "N"_a, "rules"_a, "scale"_a, "softcap"_a, "dtype"_a, "device"_a, "work"_a, "tickets"_a,
      "counters"_a, "stream"_a);
}

}  // namespace sk::span_attention
