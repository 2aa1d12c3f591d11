#include "incremental_prefill/call.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "incremental_prefill/params.h"
#include "streamkernels/error.h"

namespace sk::incremental_prefill {
namespace {

constexpr size_t kWords = 78;

class Words {
 public:
  explicit Words(const int64_t* words) : at_(words) {}

  int64_t word() { return *at_++; }
  int size() {
    const int64_t x = word();
    if (x < INT32_MIN || x > INT32_MAX) throw std::invalid_argument("incremental_prefill: a size beyond 32 bits");
    return static_cast<int>(x);
  }
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(word()));
  }
  double real() {
    const int64_t bits = word();
    double x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  Rows rows() {
    Rows r{};
    r.data = pointer<void>();
    r.batch = word(), r.head = word(), r.row = word();
    return r;
  }
  Table table() {
    Table t{};
    t.data = pointer<void>();
    t.batch = word(), t.row = word();
    return t;
  }
  Column column() {
    Column c{};
    c.data = pointer<const int32_t>();
    c.batch = word(), c.row = word();
    return c;
  }
  Segment segment() {
    Segment s{};
    s.k = rows();
    s.v = rows();
    s.capacity = size();
    return s;
  }

 private:
  const int64_t* at_;
};

void require(bool good, const char* text) {
  if (!good) throw std::invalid_argument(text);
}

void check_params(const Params& p, int dtype, int angles_dtype) {
  require(p.B >= 0 && p.B <= kMaxSessions, "incremental_prefill: q: expected a batch B of at most 1024");
  require(p.T >= 0 && p.T <= kMaxRows, "incremental_prefill: q: expected at most 512 rows T");
  require(p.HK >= 1 && p.H >= p.HK && p.H % p.HK == 0, "incremental_prefill: q: expected H to be a multiple of HK");
  require(p.D == 64 || p.D == 96 || p.D == 128 || p.D == 256,
          "incremental_prefill: q: expected a head dim D of 64, 96, 128 or 256");
  require(dtype == 1 || dtype == 2, "incremental_prefill: q: expected a dtype code of 1 or 2");
  require(angles_dtype == dtype || angles_dtype == 0, "incremental_prefill: cos: expected float32 or q's dtype");
  require(p.rotary_dim % 2 == 0 && p.rotary_dim >= 0 && p.rotary_dim <= p.D,
          "incremental_prefill: cos: expected an even rotary_dim <= D");
  require(p.segment == 0 || p.segment == 1, "incremental_prefill: segment: expected 0 or 1");
  require(p.softcap >= 0.f, "incremental_prefill: softcap: expected a number >= 0");
  bool sizes = p.ring_sinks >= 0;
  for (const Segment& s : p.segments) sizes = sizes && s.capacity >= 0 && s.sinks >= 0 && s.window >= 0;
  require(sizes, "incremental_prefill: sinks: expected capacities, sinks and windows >= 0");
  const bool none = p.B == 0 || p.T == 0;
  require(none || (p.q.data && p.k.data && p.v.data && p.length && p.status && p.o && p.lse && p.counters &&
                   p.partials && (p.rotary_dim == 0 || (p.cosine.data && p.sine.data))),
          "incremental_prefill: q: expected no null pointer");
}

}  // namespace

void call(const int64_t* words, size_t count) {
  require(count == kWords, "incremental_prefill: the caller and the extension are of different versions");
  Words w(words);
  Params p{};
  p.q = w.rows();
  p.k = w.rows();
  p.v = w.rows();
  p.cosine = w.table();
  p.sine = w.table();
  for (Segment& s : p.segments) s = w.segment();
  p.length = w.pointer<const int32_t>();
  p.length_batch = w.word(), p.length_segment = w.word();
  p.status = w.pointer<int32_t>();
  p.role = w.pointer<const int8_t>();
  p.role_batch = w.word(), p.role_row = w.word();
  p.limit = w.column();
  for (Segment& s : p.segments) s.begin = w.column();
  p.sink_logits = w.pointer<const void>();
  p.o = w.pointer<void>();
  p.lse = w.pointer<float>();
  p.counters = w.pointer<uint32_t>();
  p.partials = w.pointer<float>();
  p.B = w.size(), p.H = w.size(), p.HK = w.size(), p.T = w.size(), p.D = w.size();
  p.rotary_dim = w.size();
  p.segment = w.size();
  for (Segment& s : p.segments) s.sinks = w.size();
  p.ring_sinks = w.size();
  const bool bounded = w.word() != 0;
  for (Segment& s : p.segments) s.window = bounded ? w.size() : (w.word(), 0);
  p.scale = static_cast<float>(w.real());
  p.softcap = static_cast<float>(w.real());
  p.interleaved = w.word() != 0;
  const int dtype = w.size(), angles_dtype = w.size();
  p.angles_fp32 = angles_dtype == 0;
  p.sink_logits_fp32 = w.size() == 0;
  const int device = w.size();
  const uintptr_t stream = static_cast<uintptr_t>(w.word());
  check_params(p, dtype, angles_dtype);
  if (p.B == 0 || p.T == 0) return;
  if (const char* why = refusal(p, static_cast<DType>(dtype), device)) {
    throw NotSupported(std::string("incremental_prefill: ") + why);
  }
  launch(p, static_cast<DType>(dtype), device, stream);
}

void workspace_of(int B, int H, int HK, int T, int D, int dtype, int device, size_t& counters, size_t& partials) {
  Params p{};
  p.B = B, p.H = H, p.HK = HK, p.T = T, p.D = D;
  require(B >= 1 && B <= kMaxSessions && T >= 1 && T <= kMaxRows && HK >= 1 && H >= HK && H % HK == 0 &&
              (D == 64 || D == 96 || D == 128 || D == 256) && (dtype == 1 || dtype == 2),
          "incremental_prefill: no call has these sizes");
  const Workspace w = workspace(p, static_cast<DType>(dtype), device);
  counters = w.counters;
  partials = w.partials;
}

}  // namespace sk::incremental_prefill
