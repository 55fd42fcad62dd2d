// merge: out = weight + K * gate(|K|), or K * gate(|K|) without a weight, in one pass.
#include "merge.h"

namespace snell::SNELL_ISA {

template <class KF, class T>
struct Merge {
  const Operand<T>& u;
  const SnellMatrix &weight, &out;

  SNELL_INLINE void tile(int64_t row, int rows, int64_t column, int columns, const T* panel, const T* const* b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<KF>(u, panel, b, K);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < COLUMNS && c * LANES<T> < columns; ++c)
        write_merged<T>(out, weight, row + r, column + c * LANES<T>, columns - c * LANES<T>,
                        K[r][c] * gate_of<T>(abs(K[r][c]), u.tau, u.gate));
  }
  SNELL_INLINE void ahead(int64_t row, int64_t from, int64_t to) {
    prefetch(weight, row, from, to);
    prefetch(out, row, from, to);
  }
  SNELL_INLINE void flush(int64_t, int, int64_t) {}

  static void run(const SnellUpdate& update, const SnellMatrix* weight, const SnellMatrix* out) {
    Operand<T> u(update, KF::grouped);
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
    {
      Merge body{u, *weight, *out};
      int t = omp_get_thread_num(), team = omp_get_num_threads();
      sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
    }
  }
};

void merge(const SnellUpdate& u, const SnellMatrix* weight, const SnellMatrix* out) { dispatch<Merge>(u, weight, out); }

}  // namespace snell::SNELL_ISA
