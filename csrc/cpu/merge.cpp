// merge: out = weight + K * gate(|K|), or K * gate(|K|) without a weight, in one pass.
#include "merge.h"

namespace snell::SNELL_ISA {

template <class KF, class T, int STORAGE>
struct MergeBody {
  const Operand<T>& u;
  const SnellMatrix &weight, &out;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t row, int rows, int64_t column, int columns, const T* panel, const Rows<T>& b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<KF>(u, panel, b, K);
    for (int r = 0; r < (WHOLE ? ROWS : rows); ++r)
      for (int c = 0; c < COLUMNS && (WHOLE || c * LANES<T> < columns); ++c)
        write_merged<T, STORAGE>(out, weight, row + r, column + c * LANES<T>,
                                 WHOLE ? LANES<T> : columns - c * LANES<T>,
                                 K[r][c] * gate_of<T>(abs(K[r][c]), u.tau, u.gate));
  }
  SNELL_INLINE void ahead(int64_t row, int64_t from, int64_t to) {
    prefetch(weight, row, from, to);
    prefetch(out, row, from, to);
  }
  SNELL_INLINE void flush(int64_t, int, int64_t) {}
};

template <class KF, class T>
struct Merge {
  static void run(const SnellUpdate& update, const SnellMatrix* weight, const SnellMatrix* out) {
    Operand<T> u(update, KF::grouped, KF::distance);
    with_storage<T>(*out, *weight, [&](auto storage) {
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
      {
        MergeBody<KF, T, storage> body{u, *weight, *out};
        int t = omp_get_thread_num(), team = omp_get_num_threads();
        sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
      }
    });
  }
};

void merge(const SnellUpdate& u, const SnellMatrix* weight, const SnellMatrix* out) { dispatch<Merge>(u, weight, out); }

}  // namespace snell::SNELL_ISA
