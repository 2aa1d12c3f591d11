#include <cuda_runtime.h>

#include <atomic>
#include <string>

#include "streamkernels/error.h"
#include "streamkernels/runtime.h"

namespace sk {
namespace {

constexpr int kMaxDevices = 64;

// something to ask for on a device: code for it is in this build or it is not
__global__ void probe() {}

std::string dotted(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string describe(cudaError_t error) {
  return "CUDA error " + std::to_string(static_cast<int>(error)) + " (" + cudaGetErrorName(error) + ": " +
         cudaGetErrorString(error) + ")";
}

std::string no_device(cudaError_t error) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  // without libcuda the static runtime says "insufficient driver", not "no device"
  if (driver == 0) return "no NVIDIA driver is installed";
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver supports CUDA " + dotted(driver) + ", and this build needs " + dotted(CUDART_VERSION);
  }
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "no NVIDIA GPU is visible";
  return describe(error);
}

std::string no_code(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (major < 8) return "the GPU has compute capability " + capability + ", and the kernels need 8.0 or newer";
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(previous);
  }
  if (error == cudaSuccess) return "";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    return "this build has no code for compute capability " + capability +
           " (set STREAMKERNELS_CUDA_ARCHS and reinstall)";
  }
  return describe(error);
}

}  // namespace

std::string unavailable_reason(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  std::string reason;
  if (error != cudaSuccess || count == 0) {
    reason = no_device(error);
  } else if (device >= count) {
    reason = "there is no CUDA device " + std::to_string(device);
  } else if (device >= 0) {
    reason = no_code(device);
  }
  // an error that was only asked about must not surface at the next launch
  if (!reason.empty()) cudaGetLastError();
  return reason;
}

std::string toolkit_version() {
  return dotted(CUDART_VERSION);
}

void check(int code, const char* what) {
  const cudaError_t error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(code, std::string(what) + ": " + describe(error));
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw CudaError(static_cast<int>(error), std::string(kernel) + ": " + describe(error) + " at or before this launch");
}

DeviceGuard::DeviceGuard(int device) : previous_(device), changed_(false) {
  check(cudaGetDevice(&previous_), "asking for the current device");
  if (previous_ == device) return;
  check(cudaSetDevice(device), "choosing the device");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
}

int multiprocessors(int device) {
  static std::atomic<int> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) throw CudaError(cudaErrorInvalidDevice, "no such CUDA device");
  int count = known[device].load(std::memory_order_relaxed);
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for the multiprocessors");
    known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

uint64_t capture_id(uintptr_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id), "asking for a capture");
  return status == cudaStreamCaptureStatusActive ? id + 1 : 0;
}

}  // namespace sk
