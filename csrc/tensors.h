// Tensors as Python hands them over, read by the functions that their class gives out. For bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>

#include "streamkernels/dlpack.h"
#include "streamkernels/tensor.h"

namespace sk::tensors {

// The class of tensors, that of parameters, which are tensors too, and what reads both.
struct Classes {
  const dlpack::Exchange* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
};

inline Classes& classes() {
  static Classes known;
  return known;
}

// Whether tensors of these classes can be read from now on.
inline bool read_tensors(const pybind11::object& capsule, const pybind11::type& tensor,
                         const pybind11::type& parameter) {
  void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  const auto* exchange = static_cast<const dlpack::Exchange*>(found);
  PyErr_Clear();
  if (exchange == nullptr || exchange->major != dlpack::kMajor || exchange->read == nullptr) return false;
  // for as long as the process lives
  classes() = {exchange, reinterpret_cast<PyTypeObject*>(pybind11::type(tensor).release().ptr()),
               reinterpret_cast<PyTypeObject*>(pybind11::type(parameter).release().ptr())};
  return true;
}

// False for other objects and for tensors that have no memory of their own.
inline bool read(PyObject* object, dlpack::Tensor& out) {
  const Classes& known = classes();
  if (known.tensor == nullptr || !PyObject_TypeCheck(object, known.tensor)) return false;
  if (known.exchange->read(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

// The code of Python's `DTYPES`; -1 for another dtype.
inline int dtype_of(const dlpack::Tensor& x) {
  const dlpack::DataType type = x.dtype;
  if (type.code == dlpack::kBFloat && type.bits == 16) return static_cast<int>(DType::kBFloat16);
  if (type.code != dlpack::kFloat || (type.bits != 16 && type.bits != 32)) return -1;
  return static_cast<int>(type.bits == 16 ? DType::kFloat16 : DType::kFloat32);
}

// [B, heads, rows, D], whose elements of a row lie side by side.
inline bool has_rows(const dlpack::Tensor& x) {
  return x.ndim == 4 && (x.strides[3] == 1 || x.shape[3] <= 1);
}

inline double read_real(PyObject* number) {
  const double x = PyFloat_AsDouble(number);
  if (x == -1.0 && PyErr_Occurred()) throw pybind11::error_already_set();
  return x;
}
inline int64_t read_integer(PyObject* number) {
  const int64_t x = PyLong_AsLongLong(number);
  if (x == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return x;
}

class Bytes {
 public:
  void add(const void* data, size_t size) {
    if (size > sizeof(bytes_) - used_) {
      full_ = true;
      return;
    }
    std::memcpy(bytes_ + used_, data, size);
    used_ += size;
  }
  template <typename T>
  void add(T x) {
    add(&x, sizeof(x));
  }
  bool full() const { return full_; }
  PyObject* object() const { return PyBytes_FromStringAndSize(bytes_, static_cast<Py_ssize_t>(used_)); }

 private:
  char bytes_[4096];
  size_t used_ = 0;
  bool full_ = false;
};

inline void add(Bytes& bytes, const dlpack::Tensor& x) {
  bytes.add(x.ndim);
  bytes.add(x.dtype);
  bytes.add(x.device);
  bytes.add(x.shape, sizeof(int64_t) * static_cast<size_t>(x.ndim));
  bytes.add(x.strides, sizeof(int64_t) * static_cast<size_t>(x.ndim));
}

// What tells calls apart: classes, sizes, strides, dtypes and devices of tensors, with `borders` also where they lie
// within 16 bytes, and the values of None, bools, ints, enumerations of ints, floats and strings. False for anything
// else, subclasses of tensors among it.
inline bool describe(Bytes& bytes, PyObject* object, bool among_tensors, bool borders) {
  const bool tensor = Py_TYPE(object) == classes().tensor;
  if (object == Py_None) {
    bytes.add('n');
  } else if (tensor || Py_TYPE(object) == classes().parameter) {
    dlpack::Tensor x;
    if (!read(object, x)) return false;
    bytes.add(tensor ? 't' : 'p');
    if (borders) bytes.add(static_cast<char>(reinterpret_cast<uintptr_t>(x.address()) % 16));
    add(bytes, x);
  } else if (among_tensors) {
    return false;
  } else if (PyBool_Check(object)) {
    bytes.add(object == Py_True ? 'y' : 'f');
  } else if (PyLong_Check(object)) {
    int overflow = 0;
    bytes.add(PyLong_CheckExact(object) ? 'i' : 'e');
    bytes.add(PyLong_AsLongLongAndOverflow(object, &overflow));
    if (overflow != 0) return false;
  } else if (PyFloat_CheckExact(object)) {
    bytes.add('d');
    bytes.add(PyFloat_AS_DOUBLE(object));
  } else if (PyUnicode_CheckExact(object)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text == nullptr) {
      PyErr_Clear();
      return false;
    }
    bytes.add('s');
    bytes.add(size);
    bytes.add(text, static_cast<size_t>(size));
  } else {
    return false;
  }
  return !bytes.full();
}

// how many tensors, then these, each of which may be None, then options -> bytes; None where one cannot be described
template <bool borders>
PyObject* look(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const Py_ssize_t tensors = count > 0 ? PyLong_AsSsize_t(arguments[0]) : 0;
  if (PyErr_Occurred()) return nullptr;
  Bytes bytes;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (!describe(bytes, arguments[i], i <= tensors, borders)) Py_RETURN_NONE;
  }
  return bytes.object();
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// pybind11's own way to a function costs more than what these do
inline PyMethodDef method(const char* name, Fast function, const char* text) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, text};
}

inline void bind(pybind11::module_& m) {
  using pybind11::arg;
  m.def("read_tensors", &read_tensors, arg("exchange"), arg("tensor"), arg("parameter"));
  static PyMethodDef methods[] = {
      method("look", &look<false>, "What tells calls with other tensors and options apart, as bytes; else None."),
      method("signature", &look<true>, "`look`, and where each tensor lies within 16 bytes."),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace sk::tensors
