// span_attention at the border to Python.
#pragma once

#include <algorithm>
#include <cstdint>

#include "span_attention/hopper/params.h"
#include "span_attention/params.h"
#include "streamkernels/border.h"
#include "tensors.h"

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

// q, k, v, bounds, sink_logits (or None), o, lse, tickets, then scale and stream: Hopper's kernel for many rows, whose
// slots are all ATTEND. Its tensors are read where they are.
enum Many { kManyQ, kManyK, kManyV, kManyBounds, kManySinks, kManyO, kManyLse, kManyTickets, kManyTensors };
constexpr int kManyNumbers = 2;

inline void run_many(PyObject* const* arguments) {
  dlpack::Tensor x[kManyTensors];
  for (int i = 0; i < kManyTensors; ++i) {
    if (i == kManySinks && arguments[i] == Py_None) continue;
    border::require(tensors::read(arguments[i], x[i]), "span_attention: q: expected tensors");
  }
  const bool sinks = arguments[kManySinks] != Py_None;
  const auto rows = [&](Many i) {
    border::require(tensors::has_rows(x[i]), "span_attention: q: expected four dims, the last of stride 1");
    const Rows found{x[i].address(), x[i].strides[0], x[i].strides[1], x[i].strides[2]};
    border::require(aligned(found, 2), "span_attention: q: expected rows on 16-byte borders");
    return found;
  };
  const auto packed = [](const dlpack::Tensor& tensor) {
    int64_t next = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      if (tensor.shape[i] != 1 && tensor.strides[i] != next) return false;
      next *= tensor.shape[i];
    }
    return true;
  };
  const dlpack::Tensor &q = x[kManyQ], &k = x[kManyK], &bounds = x[kManyBounds];
  Params p{};
  p.q = rows(kManyQ), p.k = rows(kManyK), p.v = rows(kManyV);
  for (int i = 0; i < 4; ++i) {
    border::require(q.shape[i] <= INT32_MAX && k.shape[i] <= INT32_MAX, "span_attention: q: too large");
  }
  p.B = static_cast<int>(q.shape[0]), p.H = static_cast<int>(q.shape[1]), p.T = static_cast<int>(q.shape[2]);
  p.D = static_cast<int>(q.shape[3]), p.HK = static_cast<int>(k.shape[1]), p.S = static_cast<int>(k.shape[2]);
  const int dtype = tensors::dtype_of(q);
  border::require(dtype == static_cast<int>(DType::kFloat16) || dtype == static_cast<int>(DType::kBFloat16),
                  "span_attention: q: expected float16 or bfloat16");
  border::require(p.HK >= 1 && p.H % p.HK == 0, "span_attention: q: expected H a multiple of HK");
  border::require(bounds.ndim == 4 && bounds.shape[2] >= 1 && bounds.shape[2] <= hopper::kMaxSlots && packed(bounds),
                  "span_attention: spans: expected contiguous bounds of one or two slots");
  border::require(!sinks || (x[kManySinks].ndim == 1 && packed(x[kManySinks])),
                  "span_attention: sink_logits: expected contiguous ones");
  p.o = x[kManyO].address(), p.lse = static_cast<float*>(x[kManyLse].address());
  p.bounds = static_cast<const int32_t*>(bounds.address()), p.N = static_cast<int>(bounds.shape[2]);
  if (sinks) {
    p.sink_logits = x[kManySinks].address();
    p.sink_logits_fp32 = tensors::dtype_of(x[kManySinks]) == static_cast<int>(DType::kFloat32);
  }
  std::fill(p.rules, p.rules + kMaxSlots, kAttend);
  p.scale = tensors::read_real(arguments[kManyTensors]);
  const auto stream = static_cast<uintptr_t>(tensors::read_integer(arguments[kManyTensors + 1]));
  auto* const tickets = static_cast<int*>(x[kManyTickets].address());
  // a launch waits where too many are under way
  const pybind11::gil_scoped_release others;
  hopper::launch(p, tickets, static_cast<DType>(dtype), q.device.index, stream);
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
}

}  // namespace sk::span_attention
