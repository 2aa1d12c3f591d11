// The part of DLPack's C exchange API (dlpack.h, version 1.3) by which a tensor's class hands out functions that read
// its tensors where they are: an address, sizes and strides, without a copy and without the framework's headers.
#pragma once

#include <cstdint>

namespace sk::dlpack {

constexpr uint32_t kMajor = 1;  // a table of another one is laid out otherwise
constexpr uint8_t kFloat = 2, kBFloat = 4;

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;

  void* address() const { return static_cast<char*>(data) + byte_offset; }
};

struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  // what makes and takes tensors
  void (*unused[3])();
  // reads a Python object of the class without a count on it; not 0, with a Python error set, for what has no memory
  int (*read)(void* object, Tensor* out);
  void (*stream)();
};

}  // namespace sk::dlpack
