// The part of the CUDA runtime that bindings.cpp needs, without CUDA's headers.
#pragma once

#include <cstdint>
#include <string>

namespace sk {

// Empty when kernels can run on `device` (or, with -1, on some device), else one sentence why not.
std::string unavailable_reason(int device);
std::string toolkit_version();

// Makes `device` current for the scope and puts the caller's device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  bool changed_;
};

// Multiprocessors of `device`, asked once.
int multiprocessors(int device);

// A number of the CUDA graph capture that `stream` is part of, 0 if there is none.
uint64_t capture_id(uintptr_t stream);

// Throws CudaError when the launch of `kernel`, or asynchronous work before it, failed.
void check_launch(const char* kernel);
// Throws CudaError when `code` is not success.
void check(int code, const char* what);

}  // namespace sk
