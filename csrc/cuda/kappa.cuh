// K of a pair of rows. The instructions are those of kernels/kappa.py's direct path, in the same order, so the bits are the
// same: the rank axis is summed in ascending order, one fused multiply-add a column, and the compiler fuses nothing.
#pragma once
#include "device.cuh"

namespace snell {

// Positions in kernels/cuda.py's KERNELS.
enum Kernel { PIECEWISE_LINEAR, LINEAR, SIGMOID, RBF, MIXTURE };

template <int KERNEL>
struct Kappa {
  static constexpr bool distance = KERNEL != LINEAR && KERNEL != SIGMOID;
  static constexpr bool norm = KERNEL == PIECEWISE_LINEAR || KERNEL == MIXTURE;

  // A group's sum with one more rank column.
  __device__ __forceinline__ static float accumulate(float b, float a, float sum) {
    if (!distance) return __fmaf_rn(b, a, sum);
    const float d = __fsub_rn(b, a);
    return __fmaf_rn(d, d, sum);
  }

  // K of groups 0 to p, given that of the groups before and the sum of group p.
  __device__ __forceinline__ static float add_group(float sum, const float* theta, int p, float K) {
    if (norm) return __fmaf_rn(theta[p], root(sum), K);
    if (KERNEL == LINEAR) return sum;
    float unit = exponential(-__fmul_rn(theta[1], sum));
    if (KERNEL == SIGMOID) unit = quotient(1.0f, __fadd_rn(1.0f, unit));
    return __fmaf_rn(unit, theta[0], theta[2]);
  }

  // K with its softmax, if it has one, over a column whose smooth maximum is L.
  __device__ __forceinline__ static float finish(float K, const float* theta, float L) {
    if (KERNEL != MIXTURE) return K;
    constexpr float LEAST = 1.0f / (1 << 20);  // GAMMA_LEAST of kernel_functions.py
    float gamma = theta[2];
    if (gamma < LEAST && gamma > -LEAST) gamma = gamma < 0.0f ? -LEAST : LEAST;
    return __fadd_rn(__fmaf_rn(theta[0], exponential(quotient(__fsub_rn(K, L), gamma)), K), theta[1]);
  }
};

// |K|'s bits order as |K| does.
constexpr int LARGEST = 0x7FFFFFFF;
__device__ __forceinline__ int key_of(float K) { return __float_as_int(K) & LARGEST; }

}  // namespace snell
