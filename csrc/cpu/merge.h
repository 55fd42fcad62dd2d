// Writes one row of a tile of W0 + dW, for merge and factor_grad.
#pragma once
#include "tiles.h"

namespace snell::SNELL_ISA {

// out[row, column...] = weight + delta, or delta without a weight. Where delta is 0, out gets the weight's bits. A
// double weight is added in double, so that a float update does not round it to float.
template <class T>
SNELL_INLINE void write_merged(const SnellMatrix& out, const SnellMatrix& weight, int64_t row, int64_t column, int count,
                               Vec<T> delta) {
  if (sizeof(T) == 4 && weight.data && weight.dtype == SNELL_F64) {
    for (int l = 0; l < LANES<T> && l < count; ++l) {
      double w = load_scalar<double>(weight.data, row * weight.stride + column + l, weight.dtype);
      store_scalar<double>(out.data, row * out.stride + column + l, out.dtype, delta[l] == 0 ? w : w + double(delta[l]));
    }
    return;
  }
  if (weight.data) {
    Vec<T> w = load_as<T>(weight.data, row * weight.stride + column, weight.dtype, count);
    delta = delta == T(0) ? w : w + delta;
  }
  store_as<T>(out.data, row * out.stride + column, out.dtype, count, delta);
}

}  // namespace snell::SNELL_ISA
