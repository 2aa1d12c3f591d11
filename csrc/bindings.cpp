// The border to Python: ints in, or tensors that are read where they are; exceptions out. No CUDA header and no torch
// header here.
#include <pybind11/pybind11.h>

#include <exception>
#include <stdexcept>
#include <string>

#include "compact/bind.h"
#include "incremental_prefill/bind.h"
#include "incremental_prefill/params.h"
#include "reanchor/bind.h"
#include "relaunch.h"
#include "rotate/bind.h"
#include "rotate_append/params.h"
#include "select_tokens/bind.h"
#include "span_attention/bind.h"
#include "streamkernels/error.h"
#include "streamkernels/runtime.h"
#include "tensors.h"
#include "token_scores/bind.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;
using Stride = int64_t;

void* pointer(Pointer address) {
  return reinterpret_cast<void*>(address);
}

void require(bool good, const char* text) {
  if (!good) throw std::invalid_argument(text);
}

void rotate_append(Pointer k, Stride k_batch, Stride k_head, Stride k_row, Pointer v, Stride v_batch, Stride v_head,
                   Stride v_row, Pointer cosine, Stride cosine_batch, Stride cosine_row, Pointer sine,
                   Stride sine_batch, Stride sine_row, Pointer source_k, Stride source_k_batch, Stride source_k_head,
                   Stride source_k_row, Pointer source_v, Stride source_v_batch, Stride source_v_head,
                   Stride source_v_row, Pointer target_k, Stride target_k_batch, Stride target_k_head,
                   Stride target_k_row, Pointer target_v, Stride target_v_batch, Stride target_v_head,
                   Stride target_v_row, Pointer length, Stride length_batch, Stride length_segment, Pointer status,
                   Pointer role, Stride role_batch, Stride role_row, int B, int HK, int T, int D, int rotary_dim,
                   int source_capacity, int target_capacity, int segment, int sinks, bool bounded, bool interleaved,
                   int dtype, int angles_dtype, int device, Pointer stream) {
  require(B >= 0 && HK >= 0 && T >= 0, "rotate_append: k: expected sizes >= 0");
  require(D % 8 == 0 && D >= 8 && D <= 256,
          "rotate_append: k: expected a head dim D that is a multiple of 8, at most 256");
  require(rotary_dim % 2 == 0 && rotary_dim >= 0 && rotary_dim <= D,
          "rotate_append: cos: expected an even rotary_dim <= D");
  require(source_capacity >= 0 && target_capacity >= 0 && sinks >= 0, "rotate_append: sinks: expected sizes >= 0");
  require(segment == 0 || segment == 1, "rotate_append: segment: expected 0 or 1");
  require(sk::is_dtype(dtype), "rotate_append: k: expected a dtype code of 0, 1 or 2");
  require(angles_dtype == dtype || angles_dtype == static_cast<int>(sk::DType::kFloat32),
          "rotate_append: cos: expected float32 or k's dtype");
  require(B == 0 || HK == 0 || T == 0 || (k && v && length && status && (rotary_dim == 0 || (cosine && sine))),
          "rotate_append: k: expected no null pointer");
  sk::rotate_append::Params p{};
  p.k = {pointer(k), k_batch, k_head, k_row};
  p.v = {pointer(v), v_batch, v_head, v_row};
  p.cosine = {pointer(cosine), cosine_batch, cosine_row};
  p.sine = {pointer(sine), sine_batch, sine_row};
  p.source_k = {pointer(source_k), source_k_batch, source_k_head, source_k_row};
  p.source_v = {pointer(source_v), source_v_batch, source_v_head, source_v_row};
  p.target_k = {pointer(target_k), target_k_batch, target_k_head, target_k_row};
  p.target_v = {pointer(target_v), target_v_batch, target_v_head, target_v_row};
  p.length = static_cast<const int32_t*>(pointer(length));
  p.length_batch = length_batch;
  p.length_segment = length_segment;
  p.status = static_cast<int32_t*>(pointer(status));
  p.role = static_cast<const int8_t*>(pointer(role));
  p.role_batch = role_batch;
  p.role_row = role_row;
  p.B = B;
  p.HK = HK;
  p.T = T;
  p.D = D;
  p.rotary_dim = rotary_dim;
  p.source_capacity = source_capacity;
  p.target_capacity = target_capacity;
  p.segment = segment;
  p.sinks = sinks;
  p.bounded = bounded;
  p.interleaved = interleaved;
  p.angles_fp32 = angles_dtype == static_cast<int>(sk::DType::kFloat32);
  sk::rotate_append::launch(p, static_cast<sk::DType>(dtype), device, stream);
}

void bind_rotate_append(py::module_& m) {
  using py::arg;
  m.def("rotate_append", &rotate_append, arg("k"), arg("k_batch"), arg("k_head"), arg("k_row"), arg("v"),
        arg("v_batch"), arg("v_head"), arg("v_row"), arg("cos"), arg("cos_batch"), arg("cos_row"), arg("sin"),
        arg("sin_batch"), arg("sin_row"), arg("source_k"), arg("source_k_batch"), arg("source_k_head"),
        arg("source_k_row"), arg("source_v"), arg("source_v_batch"), arg("source_v_head"), arg("source_v_row"),
        arg("target_k"), arg("target_k_batch"), arg("target_k_head"), arg("target_k_row"), arg("target_v"),
        arg("target_v_batch"), arg("target_v_head"), arg("target_v_row"), arg("length"), arg("length_batch"),
        arg("length_segment"), arg("status"), arg("role"), arg("role_batch"), arg("role_row"), arg("B"), arg("HK"),
        arg("T"), arg("D"), arg("rotary_dim"), arg("source_capacity"), arg("target_capacity"), arg("segment"),
        arg("sinks"), arg("bounded"), arg("interleaved"), arg("dtype"), arg("angles_dtype"), arg("device"),
        arg("stream"));
}

void bind_pruned(py::module_& m) {
  sk::token_scores::bind(m);
  sk::select_tokens::bind(m);
  sk::compact::bind(m);
  sk::rotate::bind(m);
  sk::reanchor::bind(m);
  sk::span_attention::bind(m);
}

void preload_pruned(int device) {
  sk::token_scores::preload(device);
  sk::select_tokens::preload(device);
  sk::compact::preload(device);
  sk::rotate::preload(device);
  sk::span_attention::preload(device);
  sk::span_attention::hopper::preload(device);
}

// streamkernels.CudaError lives in Python, so that it can be named without this module
void raise_cuda_error(const sk::CudaError& e) {
  const py::object type = py::module_::import("streamkernels._ext").attr("CudaError");
  const py::object error = type(e.what(), e.code());
  PyErr_SetObject(type.ptr(), error.ptr());
}

// What `function` returns, or null with its exception as Python's: for functions that pybind11 does not wrap.
template <typename Function>
PyObject* guarded(Function function) {
  try {
    return function();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const sk::CudaError& e) {
    raise_cuda_error(e);
  } catch (const sk::NotSupported& e) {
    PyErr_SetString(PyExc_NotImplementedError, e.what());
  } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

// tensors and numbers in the order of incremental_prefill/bind.h
PyObject* incremental_prefill(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    using namespace sk::incremental_prefill;
    require(count == kTensors + kNumbers, "incremental_prefill: expected 20 tensors and 11 numbers");
    run(arguments);
    Py_RETURN_NONE;
  });
}

PyObject* span_attention_many(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    using namespace sk::span_attention;
    require(count == kManyTensors + kManyNumbers, "span_attention: expected 8 tensors and 2 numbers");
    run_many(arguments);
    Py_RETURN_NONE;
  });
}

PyObject* capture_id(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([=]() -> PyObject* {
    require(count == 1, "capture_id: expected a stream");
    const uint64_t stream = PyLong_AsUnsignedLongLong(arguments[0]);
    if (PyErr_Occurred()) return nullptr;
    return PyLong_FromUnsignedLongLong(sk::capture_id(stream));
  });
}

PyObject* relaunch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([=] { return sk::relaunch::run(arguments, count); });
}

void bind_fast(py::module_& m) {
  sk::tensors::bind(m);
  sk::incremental_prefill::bind(m);
  sk::relaunch::bind(m);
  static PyMethodDef methods[] = {
      sk::tensors::method("incremental_prefill", &incremental_prefill, "One step: 20 tensors, then 11 numbers."),
      sk::tensors::method("span_attention_many", &span_attention_many, "8 tensors, then a scale and a stream."),
      sk::tensors::method("capture_id", &capture_id, "A number of the capture that a stream is part of; else 0."),
      sk::tensors::method("relaunch", &relaunch, "What `make_relaunch` made, a stream, tensors: whether it ran."),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of streamkernels: pointers, strides in elements, sizes, a device and a stream as ints.";
  m.attr("__version__") = SK_VERSION;
  m.attr("architectures") = SK_ARCHITECTURES;
  m.attr("toolkit") = sk::toolkit_version();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const sk::CudaError& e) {
      raise_cuda_error(e);
    } catch (const sk::NotSupported& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });
  m.def("unavailable_reason", &sk::unavailable_reason, py::arg("device") = -1);
  m.def(
      "preload",
      [](int device) {
        sk::rotate_append::preload(device);
        sk::incremental_prefill::preload(device);
        preload_pruned(device);
      },
      py::arg("device"));
  bind_rotate_append(m);
  bind_fast(m);
  bind_pruned(m);
}
