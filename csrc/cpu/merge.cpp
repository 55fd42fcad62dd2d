// merge: out = weight + K * gate(|K|), or K * gate(|K|) without a weight, in one pass. K * gate(|K|) of a start, which
// has the update's shape, is subtracted first.
#include "merge.h"

namespace snell::SNELL_ISA {

template <class KF, class T, int STORAGE>
struct MergeBody {
  const Operand<T>& u;
  const Operand<T>* start;  // null: none
  const SnellMatrix &weight, &out;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t row, int rows, int64_t column, int columns, const T* panel, const Rows<T>& b) {
    Vec<T> delta[ROWS][COLUMNS];
    delta_tile<KF>(u, panel, b, delta);
    if (start) {
      Vec<T> first[ROWS][COLUMNS];
      start_tile<KF>(u, *start, panel, b, first);
      for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) delta[r][c] -= first[r][c];
    }
    for (int r = 0; r < (WHOLE ? ROWS : rows); ++r)
      for (int c = 0; c < COLUMNS && (WHOLE || c * LANES<T> < columns); ++c)
        write_merged<T, STORAGE>(out, weight, row + r, column + c * LANES<T>,
                                 WHOLE ? LANES<T> : columns - c * LANES<T>, delta[r][c]);
  }
  SNELL_INLINE void ahead(int64_t row, int64_t from, int64_t to) {
    prefetch(weight, row, from, to);
    prefetch(out, row, from, to);
  }
  SNELL_INLINE void flush(int64_t, int, int64_t) {}
};

template <class KF, class T>
struct Merge {
  static void run(const SnellUpdate& update, const SnellUpdate* start, const SnellMatrix* weight,
                  const SnellMatrix* out) {
    Operand<T> u(update, KF::grouped, KF::distance, KF::softmax);
    std::optional<Operand<T>> first = start_operand<KF, T>(start);
    with_storage<T>({out, weight}, [&](auto storage) {
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
      {
        MergeBody<KF, T, storage> body{u, first ? &*first : nullptr, *weight, *out};
        int t = omp_get_thread_num(), team = omp_get_num_threads();
        sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
      }
    });
  }
};

void merge(const SnellUpdate& u, const SnellUpdate* start, const SnellMatrix* weight, const SnellMatrix* out) {
  dispatch<Merge>(u, start, weight, out);
}

}  // namespace snell::SNELL_ISA
