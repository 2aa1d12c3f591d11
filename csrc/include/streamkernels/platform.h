// What lets one header serve nvcc and a plain host compiler: meaning is written once and tested without a GPU.
#pragma once

#if defined(__CUDACC__)
#define SK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SK_HOST_DEVICE inline
#endif
