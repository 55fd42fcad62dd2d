// What merge and factor_grad write: one tile row of W0 + dW.
#pragma once
#include "tiles.h"

namespace snell::SNELL_ISA {

// out[row, column..] = weight + delta, or delta where there is no weight. Where delta is 0 the weight's bits stay; a
// double weight is added to as double, so that a float update does not round it.
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
