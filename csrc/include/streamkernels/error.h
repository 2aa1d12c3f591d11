// The exceptions that cross the border to Python. No CUDA header here: bindings.cpp sees Python only.
#pragma once

#include <stdexcept>
#include <string>

namespace sk {

// A failed CUDA call; becomes streamkernels.CudaError with `.code`.
class CudaError : public std::runtime_error {
 public:
  CudaError(int code, const std::string& text) : std::runtime_error(text), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// A call that is well formed but that no kernel here can run; becomes NotImplementedError.
class NotSupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace sk
