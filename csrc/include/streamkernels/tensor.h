// How a tensor crosses the border: a raw pointer and strides, never a torch type.
#pragma once

#include <cstdint>

namespace sk {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline bool is_dtype(int code) {
  return code >= 0 && code <= 2;
}
inline int size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// [B, HK, rows, D]: strides in elements, last stride 1.
struct Rows {
  void* data;
  int64_t batch, head, row;
};

// [B, rows, columns]: strides in elements, last stride 1; a batch of one has batch stride 0.
struct Table {
  const void* data;
  int64_t batch, row;
};

// whether every row starts on a 16-byte border
inline bool aligned(const void* data, int size, int64_t a, int64_t b, int64_t c) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (a * size) % 16 == 0 && (b * size) % 16 == 0 &&
         (c * size) % 16 == 0;
}
inline bool aligned(const Rows& x, int size) {
  return aligned(x.data, size, x.batch, x.head, x.row);
}
inline bool aligned(const Table& x, int size) {
  return aligned(x.data, size, x.batch, x.row, 0);
}

}  // namespace sk
