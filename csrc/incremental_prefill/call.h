// A call as 64-bit words: pointers, strides, sizes. Order: see call.cpp and bind.h, which reads them from tensors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk::incremental_prefill {

// Runs the call. Throws std::invalid_argument for words that make no call, NotSupported, CudaError.
void call(const int64_t* words, size_t count);
// What a call of these sizes needs besides its arguments: 32-bit counters that are zero, bytes for partial results.
void workspace_of(int B, int H, int HK, int T, int D, int dtype, int device, size_t& counters, size_t& partials);

}  // namespace sk::incremental_prefill
