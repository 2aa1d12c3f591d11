// Tensor maps: how the copy engine finds boxes of a tensor (CUDA driver API, cuTensorMapEncodeTiled).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "streamkernels/error.h"
#include "streamkernels/runtime.h"
#include "streamkernels/tensor.h"

namespace sk::span_attention::hopper {

// cuTensorMapEncodeTiled, from the driver: this library links none
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
inline Encode encoder() {
  static std::atomic<Encode> known;
  Encode encode = known.load();
  if (encode != nullptr) return encode;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "span_attention: asking the driver for cuTensorMapEncodeTiled");
  if (result != cudaDriverEntryPointSuccess) throw NotSupported("span_attention: the driver has no tensor maps");
  known = encode = reinterpret_cast<Encode>(found);
  return encode;
}

// [B, heads, rows, D] in boxes of `box` rows and 64 columns.
inline CUtensorMap map_of(const void* data, DType dtype, int B, int heads, int rows, int D, int64_t batch, int64_t head,
                          int64_t row, int box) {
  const cuuint64_t sizes[4] = {cuuint64_t(D), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(B)};
  // a stride that nothing is multiplied by may be anything, and the driver wants multiples of 16 bytes
  const auto bytes = [](int64_t stride, int size) { return cuuint64_t(size == 1 ? 16 : stride * 2); };
  const cuuint64_t strides[3] = {bytes(row, rows), bytes(head, heads), bytes(batch, B)};
  const cuuint32_t boxes[4] = {64, cuuint32_t(box), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, type, 4, const_cast<void*>(data), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw CudaError(result, "span_attention: q: the driver made no tensor map");
  return map;
}
inline CUtensorMap map_of(const Rows& x, DType dtype, int B, int heads, int rows, int D, int box) {
  return map_of(x.data, dtype, B, heads, rows, D, x.batch, x.head, x.row, box);
}
// [B, heads, rows, D] stored [B, rows, heads, D], contiguous.
inline CUtensorMap map_of_rows_first(const void* data, DType dtype, int B, int heads, int rows, int D, int box) {
  const int64_t row = int64_t{heads} * D;
  return map_of(data, dtype, B, heads, rows, D, rows * row, D, row, box);
}

}  // namespace sk::span_attention::hopper
