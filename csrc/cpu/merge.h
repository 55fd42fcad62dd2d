// Writes one row of a tile of W0 + dW, for merge and factor_grad.
#pragma once
#include <optional>

#include "tiles.h"

namespace snell::SNELL_ISA {

// K * gate(|K|) of a tile.
template <class KF, class T>
SNELL_INLINE void delta_tile(const Operand<T>& u, const T* panel, const T* const* b, Vec<T> (&delta)[ROWS][COLUMNS]) {
  kappa_tile<KF>(u, panel, b, delta);
  for (auto& row : delta)
    for (auto& v : row) v *= gate_of<T>(abs(v), u.tau, u.gate);
}

// The same of the start, in the place of the update's tile.
template <class KF, class T>
SNELL_INLINE void start_tile(const Operand<T>& u, const Operand<T>& start, const T* panel, const T* const* b,
                             Vec<T> (&first)[ROWS][COLUMNS]) {
  const T* start_b[ROWS];
  for (int r = 0; r < ROWS; ++r) start_b[r] = start.B + (b[r] - u.B);
  delta_tile<KF>(start, start.packed.get() + (panel - u.packed.get()), start_b, first);
}

// The start of an update, if it has one.
template <class T>
std::optional<Operand<T>> start_operand(const SnellUpdate* start, bool grouped) {
  std::optional<Operand<T>> operand;
  if (start) operand.emplace(*start, grouped);
  return operand;
}

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
