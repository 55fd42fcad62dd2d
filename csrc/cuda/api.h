// The C interface of the CUDA library. kernels/cuda.py declares the same structure with ctypes.
#pragma once
#include <cstdint>

// A selection for `layers` layers of one shape, rank and kernel function. kernels/selection.py computes the numbers. All
// memory is the device's.
struct SnellSelect {
  const float *factors, *theta, *smooth_max;  // A's rows, then B's, of every layer; a rank column is `stride` long
  int64_t *state, *memo;                      // state: zeros, [layers][HEAD + bins]; memo: [2], or null
  int32_t *sample, *buckets;                  // [layers][room], [layers][bins][bucket]
  float* tau;                                 // [layers]
  int64_t stride, m, n, k, salt;
  int32_t layers, rank, groups, kernel, num_theta, samples, room, low, high, bins, bucket, programs, passes;
};
