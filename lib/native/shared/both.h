// Arithmetic that the CPU's and CUDA's kernels share: one text, so that both agree and the CPU's tests cover both.
#pragma once

#ifdef __CUDACC__
#define UPSNET_BOTH __host__ __device__ __forceinline__
#else
#define UPSNET_BOTH inline __attribute__((always_inline))
#endif
