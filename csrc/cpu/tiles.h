// Computes K tile by tile: the rows of each thread, the order of the tiles, and K of one tile.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kappa.h"

namespace snell::SNELL_ISA {

// A tile is ROWS rows by COLUMNS vectors. That is enough independent sums to hide the latency of the multiply-adds, and
// few enough for the sums and K to stay in registers (32 with AVX-512, 16 otherwise).
#if defined(__AVX512F__)
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif
constexpr int COLUMNS = 2;
template <class T>
constexpr int TILE = COLUMNS * LANES<T>;  // columns of K in a tile

// Bytes of packed A in a chunk. A sweep reads the chunk again for each group of rows, from the second-level cache: in the
// first level the pieces of W0 that it touches would be too short to stream.
constexpr int64_t CHUNK_BYTES = 96 * 1024;

// How many rows ahead to prefetch: a few microseconds of work, far more than the memory's latency.
constexpr int64_t AHEAD = 2 * ROWS;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> allocate(int64_t count) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<int64_t>(count, 1) * sizeof(T))) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// A squared distance is expanded into |a|^2 + |b|^2 - 2 a.b: one operation a rank column in place of two. A lane where
// this cancels, to below NEAR of |a|^2 + |b|^2, takes the sum of squared differences instead. Each lane decides for
// itself, so that an entry's bits do not depend on the tile. Norms are summed in double: with groups of w columns, the
// error of a distance then stays below (2 w + 4) eps.
constexpr float NEAR = 1.0f / 8;
constexpr float SMALL = 0x1p-100f;  // squares below it take the differences too: their products would be denormal
constexpr int MIN_EXPANDED = 16;    // columns of a group; in fewer dimensions, too many pairs are near

template <class T>
T quarter_norm(const T* row, int width) {  // of the square
  double sum = 0;
  for (int k = 0; k < width; ++k) sum += double(row[k]) * double(row[k]);
  return T(sum / 4);
}

// An update's factors as the tiles read them.
template <class T>
struct Operand {
  int64_t m, n, rank;
  int groups, width, gate, threads;  // `groups` statistics of `width` rank columns each
  bool expands;                      // whether distances are expanded into norms and dot products
  const T *A, *B, *theta;
  T tau;
  // A in panels of TILE columns of K: [panel][lines][TILE], padded with 0. The lines are the rank columns and, where
  // distances are expanded, the squared norms of the groups; with a softmax, the smooth maxima of the columns at last.
  Buffer<T> packed;
  Buffer<T> norms;  // of B: [m][groups]
  const T *column_max = nullptr, *row_max = nullptr;  // smooth maxima, of which one is there with a softmax
  int64_t lines, panels, chunk;

  Operand(const SnellUpdate& u, bool grouped, bool distance, bool softmax)
      : m(u.m), n(u.n), rank(u.rank), groups(grouped ? u.groups : 1), width(int(u.rank / groups)), gate(u.gate),
        expands(distance && sizeof(T) == 4 && width >= MIN_EXPANDED), A(static_cast<const T*>(u.A)),
        B(static_cast<const T*>(u.B)), theta(static_cast<const T*>(u.theta)),
        tau(u.tau ? *static_cast<const T*>(u.tau) : T(0)) {
    // Fewer multiply-adds than 2^18 do not repay waking a thread.
    threads = int(std::clamp<int64_t>(m * n * rank >> 18, 1, u.threads));
    lines = rank + (expands ? groups : 0) + softmax;
    if (softmax) (u.of_rows ? row_max : column_max) = static_cast<const T*>(u.smooth_max);
    panels = (n + TILE<T> - 1) / TILE<T>;
    chunk = std::max<int64_t>(1, CHUNK_BYTES / int64_t(lines * TILE<T> * sizeof(T)));
    packed = allocate<T>(panels * lines * TILE<T>);
    norms = allocate<T>(expands ? m * groups : 0);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
      T* to = &packed[panel * lines * TILE<T>];
      const int64_t first = panel * TILE<T>, valid = std::min<int64_t>(TILE<T>, n - first);
      if (valid < TILE<T>) std::memset(to, 0, lines * TILE<T> * sizeof(T));
      for (int64_t c = 0; c < valid; ++c) {
        const T* from = A + (first + c) * rank;
        for (int64_t k = 0; k < rank; ++k) to[k * TILE<T> + c] = from[k];
        if (softmax) to[(lines - 1) * TILE<T> + c] = column_max ? column_max[first + c] : T(0);
      }
      for (int p = 0; expands && p < groups; ++p) {  // as quarter_norm, for a whole panel
        double sums[TILE<T>] = {};
        for (int64_t k = int64_t(p) * width; k < int64_t(p + 1) * width; ++k)
          for (int c = 0; c < TILE<T>; ++c) sums[c] += double(to[k * TILE<T> + c]) * double(to[k * TILE<T> + c]);
        for (int c = 0; c < TILE<T>; ++c) to[(rank + p) * TILE<T> + c] = T(sums[c] / 4);
      }
    }
    if (!expands) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < m * groups; ++i) norms[i] = quarter_norm(B + i * width, width);
  }

  // First row of thread t of the team; threads own whole groups of ROWS.
  int64_t first_row(int t, int team) const { return std::min(m, (m + ROWS - 1) / ROWS * t / team * ROWS); }
};

// The rows of a tile: B's, and their squared norms. At the lower edge the last row is repeated.
template <class T>
struct Rows {
  int64_t first;
  int count;
  const T *b[ROWS], *norms[ROWS];
  Rows(const Operand<T>& u, int64_t first, int count) : first(first), count(count) {
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = first + std::min(r, count - 1);
      b[r] = u.B + row * u.rank;
      norms[r] = u.norms.get() + (u.expands ? row * u.groups : 0);
    }
  }
};

// The sums of group p over its rank columns: dot products or squared differences.
template <class Statistic, class T>
SNELL_INLINE void sums(const Operand<T>& u, int p, const T* panel, const Rows<T>& rows, Vec<T> (&s)[ROWS][COLUMNS]) {
  for (auto& row : s)
    for (auto& v : row) v = Vec<T>{};
  for (int64_t k = int64_t(p) * u.width; k < int64_t(p + 1) * u.width; ++k) {
    Vec<T> a[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) a[c] = load(panel + k * TILE<T> + c * LANES<T>);
    for (int r = 0; r < ROWS; ++r) {
      Vec<T> bk = splat(rows.b[r][k]);
      for (int c = 0; c < COLUMNS; ++c) s[r][c] = Statistic::accumulate(a[c], bk, s[r][c]);
    }
  }
}

template <class KF, class T>
SNELL_INLINE Vec<T> rooted(Vec<T> square) {
  return KF::root ? sqrt(square) : square;
}

// A quarter of |a|^2 + |b|^2 for one vector of a tile; the packed norms and those of the rows are quarters.
template <class T>
SNELL_INLINE Vec<T> quarter_norms(const Operand<T>& u, int p, const T* panel, const Rows<T>& rows, int r, int c) {
  return load(panel + (u.rank + p) * TILE<T> + c * LANES<T>) + splat(rows.norms[r][p]);
}

// Replaces the lanes of s whose pairs are near. Out of line, since few tiles have such lanes.
template <class KF, class T>
__attribute__((noinline)) void replace_near(const Operand<T>& u, int p, const T* panel, const Rows<T>& rows,
                                            const Vec<T> (&quarter)[ROWS][COLUMNS], Vec<T> (&s)[ROWS][COLUMNS]) {
  Vec<T> direct[ROWS][COLUMNS];
  sums<SquaredDistance>(u, p, panel, rows, direct);
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) {
      const Vec<T> least = fma(splat(T(NEAR)), quarter_norms(u, p, panel, rows, r, c), splat(T(SMALL)));
      s[r][c] = quarter[r][c] > least ? s[r][c] : rooted<KF, T>(direct[r][c]);
    }
}

// The statistics of group p by norms and dot products. They are computed as quarters: twice the root of a quarter of the
// square is the norm.
template <class KF, class T>
SNELL_INLINE void expanded(const Operand<T>& u, int p, const T* panel, const Rows<T>& rows, Vec<T> (&s)[ROWS][COLUMNS]) {
  sums<Dot>(u, p, panel, rows, s);
  Vec<T> quarter[ROWS][COLUMNS];
  unsigned far = ALL<T>;
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) {
      const Vec<T> norms = quarter_norms(u, p, panel, rows, r, c);
      quarter[r][c] = fma(splat(T(-0.5)), s[r][c], norms);
      far &= less(fma(splat(T(NEAR)), norms, splat(T(SMALL))), quarter[r][c]);
      s[r][c] = KF::root ? twice_sqrt(quarter[r][c]) : 4 * quarter[r][c];
    }
  if (__builtin_expect(far != ALL<T>, 0)) {
    Vec<T> copy[ROWS][COLUMNS];  // so that s needs no address and stays in registers
    std::memcpy(copy, s, sizeof copy);
    replace_near<KF>(u, p, panel, rows, quarter, copy);
    std::memcpy(s, copy, sizeof copy);
  }
}

// K of the rows and one panel's columns. `kept` [groups][ROWS][COLUMNS] receives what `slope` needs; with a softmax there is
// one more than groups, for the exponents.
template <class KF, class T>
SNELL_INLINE void kappa_tile(const Operand<T>& u, const T* panel, const Rows<T>& rows, Vec<T> (&K)[ROWS][COLUMNS],
                             Vec<T>* kept = nullptr) {
  for (auto& row : K)
    for (auto& v : row) v = Vec<T>{};
  for (int p = 0; p < u.groups; ++p) {
    Vec<T> s[ROWS][COLUMNS];
    if (KF::distance && u.expands) {
      expanded<KF>(u, p, panel, rows, s);
    } else {
      sums<KF>(u, p, panel, rows, s);
      for (auto& row : s)
        for (auto& v : row) v = rooted<KF, T>(v);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) {
        K[r][c] = KF::add_group(u.theta, p, s[r][c], K[r][c]);
        if (kept) kept[(p * ROWS + r) * COLUMNS + c] = s[r][c];
      }
  }
  if constexpr (KF::softmax) {
    const Softmax<T> softmax(u.theta + u.groups);
    for (int r = 0; r < ROWS; ++r) {
      const T row_max = u.row_max ? u.row_max[rows.first + std::min(r, rows.count - 1)] : T(0);
      for (int c = 0; c < COLUMNS; ++c) {
        const Vec<T> maxima = load(panel + (u.lines - 1) * TILE<T> + c * LANES<T>) + row_max;
        const Vec<T> exponent = (K[r][c] - maxima) * softmax.over_gamma;
        if (kept) kept[(u.groups * ROWS + r) * COLUMNS + c] = exponent;
        K[r][c] = softmax.value(exponent, K[r][c]);
      }
    }
  }
}

// Prefetch the elements [from, to) of a row that will be needed soon. Hardware prefetching stops at page boundaries,
// and a sweep's rows lie on different pages.
SNELL_INLINE void prefetch(const SnellMatrix& matrix, int64_t row, int64_t from, int64_t to) {
  if (!matrix.data) return;
  int64_t size = matrix.dtype == SNELL_F64 ? 8 : matrix.dtype == SNELL_F32 ? 4 : 2;
  const char* base = static_cast<const char*>(matrix.data) + row * matrix.stride * size;
  for (const char* p = base + from * size; p < base + to * size; p += 64) __builtin_prefetch(p);
}

// For the rows [first, last), one chunk of panels at a time:
//   body.tile<WHOLE>(row, rows, column, columns, panel, b)   for each tile; WHOLE: of ROWS rows and TILE columns
//   body.ahead(row, from, to)                         for a row of the chunk that will be computed soon
//   body.flush(row, rows, from)                       after each group of rows in the chunk
template <class T, class Body>
SNELL_INLINE void sweep(const Operand<T>& u, int64_t first, int64_t last, Body& body) {
  for (int64_t begin = 0; begin < u.panels; begin += u.chunk) {
    int64_t end = std::min(begin + u.chunk, u.panels);
    for (int64_t row = first; row < last; row += ROWS) {
      int rows = int(std::min<int64_t>(ROWS, last - row));
      const Rows<T> factor(u, row, rows);
      for (int64_t soon = row + AHEAD; soon < std::min(row + AHEAD + ROWS, last); ++soon)
        body.ahead(soon, begin * TILE<T>, std::min(end * TILE<T>, u.n));
      for (int64_t panel = begin; panel < end; ++panel) {
        int64_t column = panel * TILE<T>;
        int columns = int(std::min<int64_t>(TILE<T>, u.n - column));
        const T* packed = &u.packed[panel * u.lines * TILE<T>];
        if (rows == ROWS && columns == TILE<T>)
          body.template tile<true>(row, rows, column, columns, packed, factor);
        else
          body.template tile<false>(row, rows, column, columns, packed, factor);
      }
      body.flush(row, rows, begin * TILE<T>);
    }
  }
}

// Run f<KF, T>() for the update's kernel function and dtype.
template <template <class, class> class Function, class... Args>
void dispatch(const SnellUpdate& u, Args... args) {
  auto with = [&](auto dtype) {
    using T = decltype(dtype);
    switch (u.kernel) {
#define SNELL_CASE(name, KF) \
  case KERNEL_##KF: return Function<KF, T>::run(u, args...);
      SNELL_KERNEL_FUNCTIONS(SNELL_CASE)
#undef SNELL_CASE
    }
  };
  u.dtype == SNELL_F32 ? with(float{}) : with(double{});
}

}  // namespace snell::SNELL_ISA
