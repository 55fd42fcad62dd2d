// factor_grad: dA, dB and dtheta from a block of G, and in the same pass weight + dW of the block.
//
// With H = G * gate(|K|) and C^p = H * dkappa/d(statistic p), only survivors (|K| > tau) contribute. The survivors of a
// row are packed into a list, C is computed for the list, and each survivor updates one row of dA and one of dB. The
// work is proportional to the number of survivors, and it uses the differences b - a themselves, which do not cancel.
//
// G is a matrix, or absent. If few entries survive, computing G_ij = dY_i . X_j for them costs less than the GEMM for
// all of G.
#include <vector>

#include "merge.h"

namespace snell::SNELL_ISA {
namespace {

// Bytes of x for the columns of a chunk. Each row of the chunk reads the columns of its survivors, from the L2 cache.
constexpr int64_t TOKEN_BYTES = 512 * 1024;

// A factor with each group of the rank axis padded to whole vectors; no copy if they are whole already.
template <class T>
struct Padded {
  int64_t width, rank;  // padded columns of one group, and of all groups
  Buffer<T> copy;
  const T* rows;

  Padded(const Operand<T>& u, const T* factor, int64_t count)
      : width((u.width + LANES<T> - 1) / LANES<T> * LANES<T>), rank(width * u.groups), rows(factor) {
    if (width == u.width) return;
    copy = allocate<T>(count * rank);
    rows = copy.get();
    std::memset(copy.get(), 0, count * rank * sizeof(T));
#pragma omp parallel for num_threads(u.threads) schedule(static) if (u.threads > 1)
    for (int64_t i = 0; i < count; ++i)
      for (int p = 0; p < u.groups; ++p)
        std::memcpy(&copy[i * rank + p * width], factor + i * u.rank + p * u.width, u.width * sizeof(T));
  }
};

// One row's survivors within a chunk of columns.
template <class T>
struct Survivors {
  Buffer<int32_t> column;
  Buffer<T> H, kept;  // kept [groups][capacity] is overwritten with C
  int64_t capacity, count = 0;

  Survivors(int64_t columns, int groups)
      : column(allocate<int32_t>(columns + LANES<T>)), H(allocate<T>(columns + LANES<T>)),
        kept(allocate<T>((columns + LANES<T>) * groups)), capacity(columns + LANES<T>) {}
};

template <class KF, class T, int STORAGE>
struct FactorGradBody {
  const Operand<T>& u;
  const Operand<T>* start;  // what the merged weight is less; null: nothing
  const Padded<T>&A, &B;
  const SnellMatrix &G, &weight, &merged;
  const T *dY, *X;  // [m, tokens] and [n, tokens]; used if G is absent
  int64_t tokens;
  T *grad_A, *grad_B;  // this thread's [n, padded rank], and the caller's [m, rank]
  T* grad_max;         // with a softmax: this thread's [n], or the caller's [m] of rows
  std::vector<Survivors<T>> lists;
  std::vector<Vec<T>> kept;
  std::vector<Vec<T>> theta_lanes;
  std::vector<double> grad_theta;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t row, int rows, int64_t column, int columns, const T* panel, const Rows<T>& b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<KF>(u, panel, b, K, kept.data());
    Vec<T> first[ROWS][COLUMNS];
    if (start) start_tile<KF>(u, *start, panel, b, first);
    const int groups = u.groups + KF::softmax, gate_kind = u.gate;
    const T tau = u.tau;
    const int32_t local = int32_t(column % (u.chunk * TILE<T>));
    for (int r = 0; r < (WHOLE ? ROWS : rows); ++r) {
      Survivors<T>& list = lists[r];
      const int64_t capacity = list.capacity;
      int64_t count = list.count;
      for (int c = 0; c < COLUMNS && (WHOLE || c * LANES<T> < columns); ++c) {
        const int lanes = WHOLE ? LANES<T> : columns - c * LANES<T>;
        const int64_t j = column + c * LANES<T>;
        Vec<T> gate = gate_of<T>(abs(K[r][c]), tau, gate_kind);
        unsigned survive = nonzero(gate) & (lanes >= LANES<T> ? ALL<T> : (1u << lanes) - 1);
        // No branch on an empty mask: at usual sparsities it is empty too irregularly to predict.
        Vec<T> H = gate;
        if (G.data)
          H *= load_as<T>(G.data, (row + r) * G.stride + j, STORAGE == ANY ? G.dtype : STORAGE, lanes);
        compress(&list.H[count], H, survive);
        compress_columns(&list.column[count], local + c * LANES<T>, survive);
        for (int p = 0; p < groups; ++p)
          compress(&list.kept[p * capacity + count], kept[(p * ROWS + r) * COLUMNS + c], survive);
        count += __builtin_popcount(survive);
        if (merged.data) {
          Vec<T> delta = K[r][c] * gate;
          if (start) delta -= first[r][c];
          write_merged<T, STORAGE>(merged, weight, row + r, j, lanes, delta);
        }
      }
      list.count = count;
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
      if (!G.data)
        for (int64_t s = 0; s < list.count; s += TOGETHER) products(list, s, dY + (row + r) * tokens, first_column);
      slopes(list, row + r, first_column);
      for (int p = 0; p < u.groups; ++p)
        for (int64_t k = 0; k < A.width; k += LANES<T>)
          accumulate(list, &list.kept[p * list.capacity], first_column * A.rank + p * A.width + k,
                     (row + r) * B.rank + p * B.width + k, grad_B + (row + r) * u.rank + p * u.width + k,
                     int(std::min<int64_t>(LANES<T>, u.width - k)));
      list.count = 0;
    }
  }

  // Multiply H of the survivors from s on by their G. They share the loads of dY, and each sum waits for none of the
  // others.
  static constexpr int TOGETHER = 4;
  SNELL_INLINE void products(Survivors<T>& list, int64_t s, const T* dy, int64_t first_column) const {
    const int count = int(std::min<int64_t>(TOGETHER, list.count - s));
    const T* x[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) x[i] = X + (first_column + list.column[s + std::min(i, count - 1)]) * tokens;
    Vec<T> sums[TOGETHER] = {};
    for (int64_t t = 0; t < tokens; t += LANES<T>) {
      const Vec<T> d = load(dy + t);
      for (int i = 0; i < TOGETHER; ++i) sums[i] = fma(d, load(x[i] + t), sums[i]);
    }
    for (int i = 0; i < count; ++i) list.H[s + i] *= sum<T>(sums[i]);
  }

  SNELL_INLINE void slopes(Survivors<T>& list, int64_t row, int64_t first_column) {
    // Pad the last vector with H = 0 and a statistic of 0, where every slope is finite.
    for (int l = 0; l < LANES<T>; ++l) {
      list.H[list.count + l] = 0;
      for (int p = 0; p < u.groups + KF::softmax; ++p) list.kept[p * list.capacity + list.count + l] = 0;
    }
    for (auto& v : theta_lanes) v = Vec<T>{};
    if constexpr (KF::softmax) softmax_slopes(list, row, first_column);
    for (int p = 0; p < u.groups; ++p) {
      T* kept = &list.kept[p * list.capacity];
      for (int64_t s = 0; s < list.count; s += LANES<T>)
        store(kept + s, KF::template slope<T>(u.theta, p, load(kept + s), load(&list.H[s]), theta_lanes.data()));
    }
    // The constants of the function under a softmax are not trained.
    for (size_t t = KF::softmax ? u.groups : 0; t < theta_lanes.size(); ++t) grad_theta[t] += sum<T>(theta_lanes[t]);
  }

  // Turns H into H times the slope by the K under the softmax; adds the slopes by the smooth maxima.
  SNELL_INLINE void softmax_slopes(Survivors<T>& list, int64_t row, int64_t first_column) {
    const Softmax<T> softmax(u.theta + u.groups);
    const T* exponents = &list.kept[u.groups * list.capacity];
    Vec<T> total{}, by_max;
    for (int64_t s = 0; s < list.count; s += LANES<T>) {
      T* H = &list.H[s];
      store(H, softmax.slope(load(exponents + s), load(H), theta_lanes.data() + u.groups, by_max));
      total += by_max;
      for (int l = 0; u.column_max && l < LANES<T> && s + l < list.count; ++l)
        grad_max[first_column + list.column[s + l]] += by_max[l];
    }
    if (u.row_max) grad_max[row] += sum<T>(total);
  }

  // Add the contribution of a row's survivors to one vector of the rank axis.
  SNELL_INLINE void accumulate(const Survivors<T>& list, const T* C, int64_t a0, int64_t b0, T* to, int lanes) {
    constexpr int SUMS = 4;  // independent sums hide the latency of the multiply-adds
    const Vec<T> b = load(&B.rows[b0]);
    Vec<T> sums[SUMS] = {};
    const T* rows = &A.rows[a0];
    T* moved = grad_A + a0;
    const int32_t* column = list.column.get();
    const int64_t count = list.count, stride = A.rank;
    auto one = [=](int64_t s, Vec<T>& sum) __attribute__((always_inline)) {
      int64_t at = column[s] * stride;
      Vec<T> a = load(rows + at), c = splat(C[s]), d = a - b;
      sum = KF::distance ? fma(-c, d, sum) : fma(c, a, sum);
      store(moved + at, fma(c, KF::distance ? d : b, load(moved + at)));
    };
    int64_t s = 0;
    for (; s + SUMS <= count; s += SUMS)
      for (int i = 0; i < SUMS; ++i) one(s + i, sums[i]);
    for (; s < count; ++s) one(s, sums[0]);
    Vec<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (lanes >= LANES<T>) return store(to, load(to) + total);
    for (int l = 0; l < lanes; ++l) to[l] += total[l];
  }
};

template <class KF, class T>
struct FactorGrad {
  static void run(const SnellUpdate& update, const SnellUpdate* start, const SnellMatrix* G,
                  const SnellTokens* activations, const SnellMatrix* weight, const SnellMatrix* merged, void* grad_A,
                  void* grad_B, void* grad_theta, void* grad_max) {
    Operand<T> u(update, KF::grouped, KF::distance, KF::softmax);
    std::optional<Operand<T>> first = start_operand<KF, T>(merged->data ? start : nullptr);
    Padded<T> A(u, u.A, u.n), B(u, u.B, u.m);
    if (!G->data)
      u.chunk = std::clamp<int64_t>(TOKEN_BYTES / (activations->tokens * TILE<T> * int64_t(sizeof(T)) + 1), 1, u.chunk);
    // Each thread has its own dA. A single thread uses the caller's, if that needs no padding.
    T* total = static_cast<T*>(grad_A);
    const bool direct = u.threads == 1 && A.rank == u.rank;
    std::vector<Buffer<T>> parts;
    for (int t = 0; t < u.threads && !direct; ++t) {
      parts.push_back(allocate<T>(u.n * A.rank));
      std::memset(parts.back().get(), 0, u.n * A.rank * sizeof(T));
    }
    // The same for the smooth maxima of columns. A row is of one thread.
    std::vector<Buffer<T>> max_parts;
    for (int t = 0; t < u.threads && u.column_max && u.threads > 1; ++t) {
      max_parts.push_back(allocate<T>(u.n));
      std::memset(max_parts.back().get(), 0, u.n * sizeof(T));
    }
    const int num_theta = KF::scalars * u.groups + (KF::softmax ? 3 : 0);
    std::vector<std::vector<double>> theta_parts(u.threads, std::vector<double>(num_theta));
    with_storage<T>({G, weight, merged}, [&](auto storage) {
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
      {
        int t = omp_get_thread_num(), team = omp_get_num_threads();
        FactorGradBody<KF, T, storage> body{
            u, first ? &*first : nullptr, A, B, *G, *weight, *merged, static_cast<const T*>(activations->grad_y),
            static_cast<const T*>(activations->x), activations->tokens, direct ? total : parts[t].get(),
            static_cast<T*>(grad_B), max_parts.empty() ? static_cast<T*>(grad_max) : max_parts[t].get(), {}, {}, {}, {}};
        for (int r = 0; r < ROWS; ++r) body.lists.emplace_back(std::min(u.chunk, u.panels) * TILE<T>, u.groups + KF::softmax);
        body.kept.resize((u.groups + KF::softmax) * ROWS * COLUMNS);
        body.theta_lanes.resize(num_theta);
        body.grad_theta.resize(num_theta);
        sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
        theta_parts[t] = body.grad_theta;
      }
    });
    // Threads' sums are added in the order of their rows, so the same number of threads gives the same bits.
#pragma omp parallel for num_threads(u.threads) schedule(static) if (u.threads > 1)
    for (int64_t j = 0; j < u.n; ++j)
      for (int p = 0; p < u.groups; ++p)
        for (auto& part : parts) {
          const T* from = &part[j * A.rank + p * A.width];
          T* to = total + j * u.rank + p * u.width;
#pragma omp simd
          for (int k = 0; k < u.width; ++k) to[k] += from[k];
        }
    for (auto& part : max_parts)
      for (int64_t j = 0; j < u.n; ++j) static_cast<T*>(grad_max)[j] += part[j];
    for (int i = 0; i < num_theta; ++i) {
      double sum = 0;
      for (auto& part : theta_parts) sum += part[i];
      static_cast<T*>(grad_theta)[i] += T(sum);
    }
  }
};

}  // namespace

void factor_grad(const SnellUpdate& u, const SnellUpdate* start, const SnellMatrix* G, const SnellTokens* activations,
                 const SnellMatrix* weight, const SnellMatrix* merged, void* grad_A, void* grad_B, void* grad_theta,
                 void* grad_max) {
  dispatch<FactorGrad>(u, start, G, activations, weight, merged, grad_A, grad_B, grad_theta, grad_max);
}

}  // namespace snell::SNELL_ISA
