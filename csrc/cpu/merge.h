// Writes one row of a tile of W0 + dW, for merge and factor_grad.
#pragma once
#include <optional>

#include "tiles.h"

namespace snell::SNELL_ISA {

// K * gate(|K|) of a tile.
template <class KF, class T>
SNELL_INLINE void delta_tile(const Operand<T>& u, const T* panel, const Rows<T>& rows, Vec<T> (&delta)[ROWS][COLUMNS]) {
  kappa_tile<KF>(u, panel, rows, delta);
  for (auto& row : delta)
    for (auto& v : row) v *= gate_of<T>(abs(v), u.tau, u.gate);
}

// The same of the start, in the place of the update's tile.
template <class KF, class T>
SNELL_INLINE void start_tile(const Operand<T>& u, const Operand<T>& start, const T* panel, const Rows<T>& rows,
                             Vec<T> (&first)[ROWS][COLUMNS]) {
  delta_tile<KF>(start, start.packed.get() + (panel - u.packed.get()), Rows<T>(start, rows.first, rows.count), first);
}

// The start of an update, if it has one.
template <class KF, class T>
std::optional<Operand<T>> start_operand(const SnellUpdate* start) {
  std::optional<Operand<T>> operand;
  if (start) operand.emplace(*start, KF::grouped, KF::distance, KF::softmax);
  return operand;
}

// out[row, column...] = weight + delta, or delta without a weight. Where delta is 0, out gets the weight's bits. A
// double weight is added in double, so that a float update does not round it to float. STORAGE is both matrices' dtype,
// or ANY: the fewer branches an entry takes, the better.
constexpr int ANY = -1;

template <class T, int STORAGE>
SNELL_INLINE void write_merged(const SnellMatrix& out, const SnellMatrix& weight, int64_t row, int64_t column, int count,
                               Vec<T> delta) {
  if (STORAGE == ANY && sizeof(T) == 4 && weight.data && weight.dtype == SNELL_F64) {
    for (int l = 0; l < LANES<T> && l < count; ++l) {
      double w = load_scalar<double>(weight.data, row * weight.stride + column + l, weight.dtype);
      store_scalar<double>(out.data, row * out.stride + column + l, out.dtype, delta[l] == 0 ? w : w + double(delta[l]));
    }
    return;
  }
  if (weight.data) {
    const int dtype = STORAGE == ANY ? weight.dtype : STORAGE;
    Vec<T> w = load_as<T>(weight.data, row * weight.stride + column, dtype, count);
    delta = delta == T(0) ? w : w + delta;
  }
  store_as<T>(out.data, row * out.stride + column, STORAGE == ANY ? out.dtype : STORAGE, count, delta);
}

// Run f with the common dtype of the matrices that are there as a constant, where it is a usual one.
template <class T, class Function>
void with_storage(std::initializer_list<const SnellMatrix*> matrices, Function f) {
  int dtype = ANY;
  for (const SnellMatrix* matrix : matrices) {
    if (matrix->data && dtype != ANY && dtype != matrix->dtype) return f(std::integral_constant<int, ANY>());
    if (matrix->data) dtype = matrix->dtype;
  }
  if (sizeof(T) == 4 && dtype == SNELL_F32) return f(std::integral_constant<int, SNELL_F32>());
  if (sizeof(T) == 4 && dtype == SNELL_BF16) return f(std::integral_constant<int, SNELL_BF16>());
  f(std::integral_constant<int, ANY>());
}

}  // namespace snell::SNELL_ISA
