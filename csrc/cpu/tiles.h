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

// Bytes of packed A in a chunk. A sweep reads the chunk again for each group of rows, so it has to fit in the L1 cache.
constexpr int64_t CHUNK_BYTES = 32 * 1024;

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

// An update's factors as the tiles read them.
template <class T>
struct Operand {
  int64_t m, n, rank;
  int groups, width, gate, threads;  // `groups` statistics of `width` rank columns each
  const T *A, *B, *theta;
  T tau;
  Buffer<T> packed;  // A in panels of TILE columns of K: [panel][rank][TILE], padded with 0
  int64_t panels, chunk;

  Operand(const SnellUpdate& u, bool grouped)
      : m(u.m), n(u.n), rank(u.rank), groups(grouped ? u.groups : 1), width(int(u.rank / groups)), gate(u.gate),
        A(static_cast<const T*>(u.A)), B(static_cast<const T*>(u.B)), theta(static_cast<const T*>(u.theta)),
        tau(u.tau ? *static_cast<const T*>(u.tau) : T(0)) {
    // Fewer multiply-adds than 2^18 do not repay waking a thread.
    threads = int(std::clamp<int64_t>(m * n * rank >> 18, 1, u.threads));
    panels = (n + TILE<T> - 1) / TILE<T>;
    chunk = std::max<int64_t>(1, CHUNK_BYTES / int64_t(rank * TILE<T> * sizeof(T)));
    packed = allocate<T>(panels * rank * TILE<T>);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
      T* to = &packed[panel * rank * TILE<T>];
      const int64_t first = panel * TILE<T>, valid = std::min<int64_t>(TILE<T>, n - first);
      if (valid < TILE<T>) std::memset(to, 0, rank * TILE<T> * sizeof(T));
      for (int64_t c = 0; c < valid; ++c) {
        const T* from = A + (first + c) * rank;
        for (int64_t k = 0; k < rank; ++k) to[k * TILE<T> + c] = from[k];
      }
    }
  }

  // First row of thread t of the team; threads own whole groups of ROWS.
  int64_t first_row(int t, int team) const { return std::min(m, (m + ROWS - 1) / ROWS * t / team * ROWS); }
};

// K of rows b[0..ROWS) and one panel's columns. `kept` [groups][ROWS][COLUMNS] receives what `slope` needs.
template <class KF, class T>
SNELL_INLINE void kappa_tile(const Operand<T>& u, const T* panel, const T* const* b, Vec<T> (&K)[ROWS][COLUMNS],
                             Vec<T>* kept = nullptr) {
  for (auto& row : K)
    for (auto& v : row) v = Vec<T>{};
  for (int p = 0; p < u.groups; ++p) {
    Vec<T> s[ROWS][COLUMNS] = {};
    for (int64_t k = int64_t(p) * u.width; k < int64_t(p + 1) * u.width; ++k) {
      Vec<T> a[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) a[c] = load(panel + k * TILE<T> + c * LANES<T>);
      for (int r = 0; r < ROWS; ++r) {
        Vec<T> bk = splat(b[r][k]);
        for (int c = 0; c < COLUMNS; ++c) s[r][c] = KF::accumulate(a[c], bk, s[r][c]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) {
        K[r][c] = KF::add_group(u.theta, p, s[r][c], K[r][c]);
        if (kept) kept[(p * ROWS + r) * COLUMNS + c] = s[r][c];
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
//   body.tile(row, rows, column, columns, panel, b)   for each tile; at the lower edge b repeats the last row
//   body.ahead(row, from, to)                         for a row of the chunk that will be computed soon
//   body.flush(row, rows, from)                       after each group of rows in the chunk
template <class T, class Body>
SNELL_INLINE void sweep(const Operand<T>& u, int64_t first, int64_t last, Body& body) {
  for (int64_t begin = 0; begin < u.panels; begin += u.chunk) {
    int64_t end = std::min(begin + u.chunk, u.panels);
    for (int64_t row = first; row < last; row += ROWS) {
      int rows = int(std::min<int64_t>(ROWS, last - row));
      const T* b[ROWS];
      for (int r = 0; r < ROWS; ++r) b[r] = u.B + (row + std::min(r, rows - 1)) * u.rank;
      for (int64_t soon = row + AHEAD; soon < std::min(row + AHEAD + ROWS, last); ++soon)
        body.ahead(soon, begin * TILE<T>, std::min(end * TILE<T>, u.n));
      for (int64_t panel = begin; panel < end; ++panel) {
        int64_t column = panel * TILE<T>;
        int columns = int(std::min<int64_t>(TILE<T>, u.n - column));
        body.tile(row, rows, column, columns, &u.packed[panel * u.rank * TILE<T>], b);
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
