// CUDA as the kernels use it: from nvcc, or from emulate.h where a C++ compiler makes the library that tests run.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define SNELL_SHARED(type, name) __shared__ type name
#else
#include "emulate.h"

#define SNELL_SHARED(type, name) type& name = *reinterpret_cast<type*>(emulate::shared)
#endif

namespace snell {

// The instructions that Triton compiles sqrt, exp and division to: K needs the bits of Triton's kernels.
#ifdef __CUDACC__
__device__ __forceinline__ float root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(__fmul_rn(x, __int_as_float(0x3FB8AA3B))));
  return y;
}

__device__ __forceinline__ float quotient(float a, float b) {
  float y;
  asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

template <class... Parameters, class... Values>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Values... values) {
  kernel<<<grid, threads, 0, stream>>>(values...);
  return cudaGetLastError();
}
#else
inline float root(float x) { return std::sqrt(x); }
inline float exponential(float x) { return emulate::exponential(x); }
inline float quotient(float a, float b) { return a / b; }

template <class... Parameters, class... Values>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t, Values... values) {
  emulate::body = [=] { kernel(values...); };
  return emulate::run_grid(grid, threads) ? cudaSuccess : cudaErrorLaunchFailure;
}
#endif

// The sum over a warp, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

}  // namespace snell
