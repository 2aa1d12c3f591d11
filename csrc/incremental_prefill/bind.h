// incremental_prefill at the border to Python: its tensors themselves, read into the words that call.h takes.
#pragma once

#include <algorithm>
#include <utility>

#include "incremental_prefill/call.h"
#include "incremental_prefill/params.h"
#include "streamkernels/border.h"
#include "streamkernels/error.h"
#include "streamkernels/runtime.h"
#include "tensors.h"

namespace sk::incremental_prefill {

// in the order in which Python gives them; numbers follow
enum Place {
  kQ,
  kK,
  kV,
  kCos,
  kSin,
  kSourceK,
  kSourceV,
  kTargetK,
  kTargetV,
  kLength,
  kStatus,
  kRole,
  kLimit,
  kSourceBegin,
  kTargetBegin,
  kSinkLogits,
  kO,
  kLse,
  kCounters,
  kPartials,
  kTensors
};
// segment, sinks of both, ring_sinks, bounded, windows of both, scale, softcap, interleaved, stream
constexpr int kNumbers = 11, kScale = 7, kSoftcap = 8;

class Reader {
 public:
  explicit Reader(PyObject* const* arguments) {
    for (int i = 0; i < kTensors; ++i) {
      there_[i] = arguments[i] != Py_None;
      if (there_[i] && !tensors::read(arguments[i], x_[i])) {
        throw std::invalid_argument("incremental_prefill: expected tensors");
      }
    }
  }

  const dlpack::Tensor& operator[](Place i) const { return x_[i]; }
  bool there(Place i) const { return there_[i]; }

  void word(int64_t x) { *at_++ = x; }
  void address(Place i) { word(there_[i] ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(x_[i].address())) : 0); }
  // [B, heads, rows, D]
  void rows(Place i) {
    border::require(there_[i] && tensors::has_rows(x_[i]),
                    "incremental_prefill: q: expected four dims, the last of stride 1");
    address(i);
    for (int d = 0; d < 3; ++d) word(x_[i].strides[d]);
  }
  // [B or 1, T, rotary_dim / 2]
  void table(Place i) {
    const bool three = there_[i] && x_[i].ndim == 3;
    border::require(three == there_[i], "incremental_prefill: cos: expected three dims");
    address(i);
    word(three && x_[i].shape[0] > 1 ? x_[i].strides[0] : 0);
    word(three ? x_[i].strides[1] : 0);
  }
  // two dims
  void column(Place i) {
    const bool two = there_[i] && x_[i].ndim == 2;
    border::require(two == there_[i], "incremental_prefill: role: expected two dims");
    address(i);
    for (int d = 0; d < 2; ++d) word(two ? x_[i].strides[d] : 0);
  }
  int dtype(Place i) const {
    const int code = tensors::dtype_of(x_[i]);
    border::require(code >= 0, "incremental_prefill: q: expected float32, float16 or bfloat16");
    return code;
  }
  void real(PyObject* number) {
    const double x = tensors::read_real(number);
    int64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    word(bits);
  }
  void integer(PyObject* number) { word(tensors::read_integer(number)); }
  void run() {
    // a launch waits where too many are under way
    const pybind11::gil_scoped_release others;
    call(words_, static_cast<size_t>(at_ - words_));
  }

 private:
  dlpack::Tensor x_[kTensors];
  bool there_[kTensors];
  int64_t words_[96];
  int64_t* at_ = words_;
};

inline void run(PyObject* const* arguments) {
  Reader r(arguments);
  PyObject* const* numbers = arguments + kTensors;
  for (Place i : {kQ, kK, kV}) r.rows(i);
  const bool rotated = r.there(kCos) && r.there(kSin);
  for (Place i : {kCos, kSin}) r.table(i);
  for (Place i : {kSourceK, kTargetK}) {
    r.rows(i);
    r.rows(static_cast<Place>(i + 1));
    r.word(r[i].shape[2]);
  }
  r.column(kLength);
  r.address(kStatus);
  for (Place i : {kRole, kLimit, kSourceBegin, kTargetBegin}) r.column(i);
  for (Place i : {kSinkLogits, kO, kLse, kCounters, kPartials}) r.address(i);
  const dlpack::Tensor& q = r[kQ];
  for (int64_t size : {q.shape[0], q.shape[1], r[kK].shape[1], q.shape[2], q.shape[3]}) r.word(size);
  r.word(rotated ? 2 * r[kCos].shape[2] : 0);
  for (int i = 0; i < kScale; ++i) r.integer(numbers[i]);
  r.real(numbers[kScale]);
  r.real(numbers[kSoftcap]);
  r.integer(numbers[kSoftcap + 1]);
  const int dtype = r.dtype(kQ);
  r.word(dtype);
  r.word(rotated ? r.dtype(kCos) : dtype);
  r.word(r.there(kSinkLogits) ? r.dtype(kSinkLogits) : dtype);
  r.word(q.device.index);
  r.integer(numbers[kNumbers - 1]);
  r.run();
}

inline void bind(pybind11::module_& m) {
  using pybind11::arg;
  m.def(
      "incremental_prefill_workspace",
      [](int B, int H, int HK, int T, int D, int dtype, int device) {
        size_t counters = 0, partials = 0;
        workspace_of(B, H, HK, T, D, dtype, device, counters, partials);
        return std::make_pair(counters, partials);
      },
      arg("B"), arg("H"), arg("HK"), arg("T"), arg("D"), arg("dtype"), arg("device"));
}

}  // namespace sk::incremental_prefill
