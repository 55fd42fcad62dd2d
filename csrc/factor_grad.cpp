// factor_grad: dA, dB and dtheta from a block of G, and in the same pass weight + dW of the block.
//
// With H = G * gate(|K|) and C^p = H * dkappa/d(statistic p), nothing but a survivor adds anything: a row's survivors
// are packed into a list, C is computed for the list, and each survivor moves one row of dA and one of dB. That is
// work in proportion to the survivors, and it uses the differences b - a themselves, which do not cancel.
#include <vector>

#include "merge.h"

namespace snell::SNELL_ISA {
namespace {

// The factors with each group of the rank axis padded to whole vectors.
template <class T>
struct Padded {
  int64_t width, rank;  // of a group, of all groups
  Buffer<T> rows;

  Padded(const Operand<T>& u, const T* factor, int64_t count)
      : width((u.width + LANES<T> - 1) / LANES<T> * LANES<T>), rank(width * u.groups), rows(allocate<T>(count * rank)) {
#pragma omp parallel for num_threads(u.threads) schedule(static) if (u.threads > 1)
    for (int64_t i = 0; i < count; ++i)
      for (int p = 0; p < u.groups; ++p)
        for (int64_t k = 0; k < width; ++k)
          rows[i * rank + p * width + k] = factor && k < u.width ? factor[i * u.rank + p * u.width + k] : T(0);
  }
};

// One row's survivors within a chunk of columns.
template <class T>
struct Survivors {
  std::vector<int32_t> column;
  std::vector<T> H, kept;  // kept [groups][capacity]; C takes its place
  int64_t capacity, count = 0;

  Survivors(int64_t columns, int groups)
      : column(columns + LANES<T>), H(columns + LANES<T>), kept((columns + LANES<T>) * groups),
        capacity(columns + LANES<T>) {}
};

template <class KF, class T>
struct FactorGrad {
  const Operand<T>& u;
  const Padded<T>&A, &B;
  const SnellMatrix &G, &weight, &merged;
  T *grad_A, *grad_B;  // of this thread: padded [n], and the caller's [m]
  std::vector<Survivors<T>> lists;
  std::vector<Vec<T>> kept;
  std::vector<Vec<T>> theta_lanes;
  std::vector<double> grad_theta;

  SNELL_INLINE void tile(int64_t row, int rows, int64_t column, int columns, const T* panel, const T* const* b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<KF>(u, panel, b, K, kept.data());
    int64_t base = column / (u.chunk * TILE<T>) * (u.chunk * TILE<T>);
    for (int r = 0; r < rows; ++r) {
      Survivors<T>& list = lists[r];
      for (int c = 0; c < COLUMNS && c * LANES<T> < columns; ++c) {
        int count = columns - c * LANES<T>;
        int64_t j = column + c * LANES<T>;
        Vec<T> gate = gate_of<T>(abs(K[r][c]), u.tau, u.gate);
        unsigned survive = ~bits(gate == T(0)) & (count >= LANES<T> ? (1u << (LANES<T> - 1) << 1) - 1 : (1u << count) - 1);
        if (survive) {
          Vec<T> H = load_as<T>(G.data, (row + r) * G.stride + j, G.dtype, count) * gate;
          compress(&list.H[list.count], H, survive);
          compress_columns(&list.column[list.count], int32_t(j - base), survive);
          for (int p = 0; p < u.groups; ++p)
            compress(&list.kept[p * list.capacity + list.count], kept[(p * ROWS + r) * COLUMNS + c], survive);
          list.count += __builtin_popcount(survive);
        }
        if (merged.data) write_merged<T>(merged, weight, row + r, j, count, K[r][c] * gate);
      }
    }
  }

  static SNELL_INLINE void compress_columns(int32_t* to, int32_t first, unsigned set) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i packed = _mm512_maskz_compress_epi32(__mmask16(set), _mm512_add_epi32(lanes, _mm512_set1_epi32(first)));
    if constexpr (sizeof(T) == 4)
      _mm512_storeu_si512(to, packed);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(packed));
#else
    for (; set; set &= set - 1) *to++ = first + __builtin_ctz(set);
#endif
  }

  SNELL_INLINE void ahead(int64_t row, int64_t from, int64_t to) {
    prefetch(G, row, from, to);
    prefetch(weight, row, from, to);
    if (merged.data != G.data) prefetch(merged, row, from, to);
  }

  SNELL_INLINE void flush(int64_t row, int rows, int64_t first_column) {
    for (int r = 0; r < rows; ++r) {
      Survivors<T>& list = lists[r];
      slopes(list);
      for (int p = 0; p < u.groups; ++p)
        for (int64_t k = 0; k < A.width; k += LANES<T>)
          accumulate(list, &list.kept[p * list.capacity], first_column * A.rank + p * A.width + k,
                     (row + r) * B.rank + p * B.width + k, grad_B + (row + r) * u.rank + p * u.width + k,
                     int(std::min<int64_t>(LANES<T>, u.width - k)));
      list.count = 0;
    }
  }

  SNELL_INLINE void slopes(Survivors<T>& list) {
    // The tail of the last vector is given H = 0, and a statistic of 1 that no kernel function divides by zero.
    for (int l = 0; l < LANES<T>; ++l) {
      list.H[list.count + l] = 0;
      for (int p = 0; p < u.groups; ++p) list.kept[p * list.capacity + list.count + l] = 1;
    }
    for (auto& v : theta_lanes) v = Vec<T>{};
    for (int p = 0; p < u.groups; ++p) {
      T* kept = &list.kept[p * list.capacity];
      for (int64_t s = 0; s < list.count; s += LANES<T>)
        store(kept + s, KF::template slope<T>(u.theta, p, load(kept + s), load(&list.H[s]), theta_lanes.data()));
    }
    for (size_t t = 0; t < theta_lanes.size(); ++t) grad_theta[t] += sum<T>(theta_lanes[t]);
  }

  // One vector of the rank axis, for all survivors of a row. Four sums run side by side to hide their latency.
  SNELL_INLINE void accumulate(const Survivors<T>& list, const T* C, int64_t a0, int64_t b0, T* to, int lanes) {
    constexpr int SUMS = 4;
    const Vec<T> b = load(&B.rows[b0]);
    Vec<T> sums[SUMS] = {};
    auto one = [&](int64_t s, Vec<T>& sum) __attribute__((always_inline)) {
      int64_t at = a0 + int64_t(list.column[s]) * A.rank;
      Vec<T> a = load(&A.rows[at]), c = splat(C[s]), moved = load(grad_A + at);
      Vec<T> d = b - a;
      sum = KF::distance ? fma(c, d, sum) : fma(c, a, sum);
      store(grad_A + at, KF::distance ? fma(-c, d, moved) : fma(c, b, moved));
    };
    int64_t s = 0;
    for (; s + SUMS <= list.count; s += SUMS)
      for (int i = 0; i < SUMS; ++i) one(s + i, sums[i]);
    for (; s < list.count; ++s) one(s, sums[0]);
    Vec<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int l = 0; l < lanes; ++l) to[l] += total[l];
  }

  static void run(const SnellUpdate& update, const SnellMatrix* G, const SnellMatrix* weight, const SnellMatrix* merged,
                  void* grad_A, void* grad_B, void* grad_theta) {
    Operand<T> u(update, KF::grouped);
    Padded<T> A(u, u.A, u.n), B(u, u.B, u.m);
    std::vector<Padded<T>> parts;
    for (int t = 0; t < u.threads; ++t) parts.emplace_back(u, nullptr, u.n);
    int num_theta = KF::num_theta(u.groups);
    std::vector<std::vector<double>> theta_parts(u.threads, std::vector<double>(num_theta));
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
    {
      int t = omp_get_thread_num(), team = omp_get_num_threads();
      FactorGrad body{u, A, B, *G, *weight, *merged, parts[t].rows.get(), static_cast<T*>(grad_B), {}, {}, {}, {}};
      body.lists.assign(ROWS, Survivors<T>(std::min(u.chunk, u.panels) * TILE<T>, u.groups));
      body.kept.resize(u.groups * ROWS * COLUMNS);
      body.theta_lanes.resize(num_theta);
      body.grad_theta.resize(num_theta);
      sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
      theta_parts[t] = body.grad_theta;
    }
    // Threads' shares are added in the order of their rows, so the same threads give the same bits.
    T* total = static_cast<T*>(grad_A);
#pragma omp parallel for num_threads(u.threads) schedule(static) if (u.threads > 1)
    for (int64_t j = 0; j < u.n; ++j)
      for (int p = 0; p < u.groups; ++p)
        for (int64_t k = 0; k < u.width; ++k) {
          T sum = 0;
          for (auto& part : parts) sum += part.rows[j * A.rank + p * A.width + k];
          total[j * u.rank + p * u.width + k] += sum;
        }
    for (int i = 0; i < num_theta; ++i) {
      double sum = 0;
      for (auto& part : theta_parts) sum += part[i];
      static_cast<T*>(grad_theta)[i] += T(sum);
    }
  }
};

}  // namespace

void factor_grad(const SnellUpdate& u, const SnellMatrix* G, const SnellMatrix* weight, const SnellMatrix* merged,
                 void* grad_A, void* grad_B, void* grad_theta) {
  dispatch<FactorGrad>(u, G, weight, merged, grad_A, grad_B, grad_theta);
}

}  // namespace snell::SNELL_ISA
