// How tensors come over the border to Python: an address and strides as one tuple of ints. For bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "streamkernels/tensor.h"

namespace sk::border {

inline void require(bool good, const char* text) {
  if (!good) throw std::invalid_argument(text);
}

// the ints of a tuple of exactly N; false when it is something else
template <int N>
bool read(pybind11::handle source, int64_t (&out)[N]) {
  if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != N) return false;
  for (int i = 0; i < N; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
    if (out[i] == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

inline void* address(int64_t number) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(number));
}

}  // namespace sk::border

namespace pybind11::detail {

// (address, batch, head, row)
template <>
struct type_caster<sk::Rows> {
  PYBIND11_TYPE_CASTER(sk::Rows, const_name("tuple[int, int, int, int]"));
  bool load(handle source, bool) {
    int64_t x[4];
    if (!sk::border::read(source, x)) return false;
    value = {sk::border::address(x[0]), x[1], x[2], x[3]};
    return true;
  }
};

// (address, batch, row)
template <>
struct type_caster<sk::Table> {
  PYBIND11_TYPE_CASTER(sk::Table, const_name("tuple[int, int, int]"));
  bool load(handle source, bool) {
    int64_t x[3];
    if (!sk::border::read(source, x)) return false;
    value = {sk::border::address(x[0]), x[1], x[2]};
    return true;
  }
};

}  // namespace pybind11::detail
