// The structures of the native library's C interface. snell/native.py declares the same ones with ctypes.
#pragma once
#include <cstdint>

enum SnellDtype : int32_t { SNELL_F32 = 0, SNELL_F64 = 1, SNELL_BF16 = 2, SNELL_F16 = 3 };

// An update: factors A [n, rank] and B [m, rank], theta and tau, all contiguous and of one dtype (F32 or F64). So is
// smooth_max, for a kernel function with a softmax: [n] of the columns, or [m] of the rows (`of_rows`).
// `kernel` and `gate` are positions in the lists of names that snell_kernel_functions() and snell_gates() return.
struct SnellUpdate {
  int64_t m, n, rank;
  const void *A, *B, *theta, *tau, *smooth_max;
  int32_t dtype, kernel, groups, gate, threads, of_rows;
};

// A matrix [m, n] with contiguous rows; `stride` is the number of elements from row to row. Null data: no matrix.
struct SnellMatrix {
  void* data;
  int64_t stride;
  int32_t dtype;
};

// Activations, contiguous and in the update's dtype: grad_y [m, tokens] and x [n, tokens], with G = grad_y x^T. Both are
// padded with zeros to a multiple of SNELL_TOKENS tokens, so that rows are whole vectors.
enum : int32_t { SNELL_TOKENS = 16 };
struct SnellTokens {
  const void *grad_y, *x;
  int64_t tokens;
};

// An edit of a layer's outputs, z = scaling * u + bias. u and the gradient of z, `grad`, are [tokens, m] of `dtype`; the
// vectors [m] are of `vector_dtype` (F32 or F64). All are contiguous. Null: not there.
struct SnellEdit {
  int64_t tokens, m;
  const void *u, *grad, *scaling, *bias;
  int32_t dtype, vector_dtype, threads;
};
