// Launches of a kernel that Triton compiled, made again with other tensors. For bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "streamkernels/error.h"
#include "tensors.h"

namespace sk::relaunch {

// CUlaunchConfig, without attributes
struct Config {
  unsigned grid[3], block[3];
  unsigned shared;
  void* stream;
  void* attributes;
  unsigned count;
};
// cuLaunchKernelEx
using Launch = int (*)(const Config*, void* function, void** parameters, void** extra);

// CUtensorMap
struct alignas(64) Map {
  char bytes[128];
};
// Triton's Python object around one: the map lies on its next 128 bytes
constexpr Py_ssize_t kMapObject = 256, kMapInObject = 128;
constexpr size_t kMostMaps = 512, kMostTensors = 32, kMostParameters = 160;
constexpr int kInvalidContext = 201;

struct Parameter {
  char kind;  // 'n': a number, 'p': the address of a tensor, 'm': the map of one
  int tensor;
  int64_t number;  // its bytes
};

struct Kernel {
  Launch launch;
  void* function;
  Config config;
  size_t tensors = 0;
  std::vector<Parameter> parameters;
  // of each parameter that is one, by address
  std::vector<std::unordered_map<uintptr_t, Map>> maps;
  pybind11::object make;  // (tensor's place, tensor) -> Triton's object
};

inline constexpr const char* kCapsule = "streamkernels.relaunch";

inline pybind11::capsule make(uintptr_t launch, uintptr_t function, const std::vector<unsigned>& grid, unsigned threads,
                              unsigned shared, size_t tensors, const pybind11::list& parameters,
                              const pybind11::object& make_map) {
  auto kernel = std::make_unique<Kernel>();
  kernel->launch = reinterpret_cast<Launch>(launch);
  kernel->function = reinterpret_cast<void*>(function);
  kernel->config = {{grid.at(0), grid.at(1), grid.at(2)}, {threads, 1, 1}, shared, nullptr, nullptr, 0};
  kernel->tensors = tensors;
  kernel->make = make_map;
  for (const pybind11::handle& each : parameters) {
    const auto given = each.cast<pybind11::tuple>();
    Parameter p{given[0].cast<std::string>().at(0), given[1].cast<int>(), 0};
    const std::string bytes = given[2].cast<pybind11::bytes>();
    if (bytes.size() > sizeof(p.number) || p.tensor < 0 ||
        static_cast<size_t>(p.tensor) >= std::max<size_t>(tensors, 1)) {
      throw std::invalid_argument("relaunch: a parameter that is none");
    }
    std::memcpy(&p.number, bytes.data(), bytes.size());
    kernel->parameters.push_back(p);
    kernel->maps.emplace_back();
  }
  if (tensors > kMostTensors || kernel->parameters.size() > kMostParameters) {
    throw std::invalid_argument("relaunch: too many parameters");
  }
  return pybind11::capsule(kernel.release(), kCapsule, [](void* held) { delete static_cast<Kernel*>(held); });
}

// the map over a tensor, made once per address, since all else about it is the kernel's
inline void map_of(const Kernel& kernel, std::unordered_map<uintptr_t, Map>& known, int place, PyObject* tensor,
                   uintptr_t address, Map& out) {
  auto found = known.find(address);
  if (found == known.end()) {
    const pybind11::object made = kernel.make(place, pybind11::reinterpret_borrow<pybind11::object>(tensor));
    if (Py_TYPE(made.ptr())->tp_basicsize != kMapObject || reinterpret_cast<uintptr_t>(made.ptr()) % 128 != 0) {
      throw std::invalid_argument("relaunch: expected Triton's tensor map");
    }
    if (known.size() >= kMostMaps) known.clear();
    Map map;
    std::memcpy(&map, reinterpret_cast<char*>(made.ptr()) + kMapInObject, sizeof(map));
    found = known.emplace(address, map).first;
  }
  out = found->second;
}

// (kernel, stream, tensors...) -> whether it was launched: not where a tensor cannot be read, nor in a thread that has
// no context yet
inline PyObject* run(PyObject* const* arguments, Py_ssize_t count) {
  auto* kernel = count < 2 ? nullptr : static_cast<Kernel*>(PyCapsule_GetPointer(arguments[0], kCapsule));
  if (kernel == nullptr) return nullptr;
  if (static_cast<size_t>(count - 2) != kernel->tensors) throw std::invalid_argument("relaunch: other tensors");
  const uint64_t stream = PyLong_AsUnsignedLongLong(arguments[1]);
  if (PyErr_Occurred()) return nullptr;
  uintptr_t addresses[kMostTensors];
  for (size_t i = 0; i < kernel->tensors; ++i) {
    addresses[i] = 0;
    if (arguments[2 + i] == Py_None) continue;
    dlpack::Tensor x;
    if (!tensors::read(arguments[2 + i], x)) Py_RETURN_FALSE;
    addresses[i] = reinterpret_cast<uintptr_t>(x.address());
  }
  // copies: another thread may launch the same kernel while the driver reads these
  int64_t numbers[kMostParameters];
  Map maps[8];
  void* pointers[kMostParameters];
  int used = 0;
  for (size_t i = 0; i < kernel->parameters.size(); ++i) {
    const Parameter& p = kernel->parameters[i];
    if (p.kind == 'm') {
      if (used == 8) throw std::invalid_argument("relaunch: more than 8 tensor maps");
      map_of(*kernel, kernel->maps[i], p.tensor, arguments[2 + p.tensor], addresses[p.tensor], maps[used]);
      pointers[i] = &maps[used++];
      continue;
    }
    numbers[i] = p.kind == 'p' ? static_cast<int64_t>(addresses[p.tensor]) : p.number;
    pointers[i] = &numbers[i];
  }
  Config config = kernel->config;
  config.stream = reinterpret_cast<void*>(static_cast<uintptr_t>(stream));
  int code = 0;
  if (config.grid[0] && config.grid[1] && config.grid[2]) {
    const Launch launch = kernel->launch;
    void* const function = kernel->function;
    // a launch waits where too many are under way
    Py_BEGIN_ALLOW_THREADS;
    code = launch(&config, function, pointers, nullptr);
    Py_END_ALLOW_THREADS;
  }
  if (code == kInvalidContext) Py_RETURN_FALSE;
  if (code != 0) throw CudaError(code, "launching a Triton kernel: CUDA error " + std::to_string(code));
  Py_RETURN_TRUE;
}

inline void bind(pybind11::module_& m) {
  using pybind11::arg;
  m.def("make_relaunch", &make, arg("launch"), arg("function"), arg("grid"), arg("threads"), arg("shared"),
        arg("tensors"), arg("parameters"), arg("make_map"));
}

}  // namespace sk::relaunch
