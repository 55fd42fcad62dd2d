// The smooth maximum of each column, L_j = gamma log sum_i exp(K_ij / gamma), and its gradients. K is that of the function
// under the softmax. Every entry counts, so the gradients have no lists of survivors: a tile's C stays in registers.
#include <vector>

#include "tiles.h"

namespace snell::SNELL_ISA {
namespace {

using Inner = PiecewiseLinear;

// Maxima and sums of one thread's rows, for each column of the panels.
template <class T>
struct Online {
  const Operand<T>& u;
  T over_gamma;
  T *top, *sum;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t, int rows, int64_t column, int, const T* panel, const Rows<T>& b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<Inner>(u, panel, b, K);
    for (int c = 0; c < COLUMNS; ++c) {
      T *tops = top + column + c * LANES<T>, *sums = sum + column + c * LANES<T>;
      const Vec<T> before = load(tops);
      Vec<T> now = before;
      for (int r = 0; r < ROWS; ++r) {  // the last row may be repeated
        if (over_gamma > 0)
          now = K[r][c] > now ? K[r][c] : now;
        else
          now = K[r][c] < now ? K[r][c] : now;
      }
      Vec<T> total = load(sums) * exp((before - now) * over_gamma);
      for (int r = 0; r < (WHOLE ? ROWS : rows); ++r) total += exp((K[r][c] - now) * over_gamma);
      store(tops, now);
      store(sums, total);
    }
  }
  SNELL_INLINE void ahead(int64_t, int64_t, int64_t) {}
  SNELL_INLINE void flush(int64_t, int, int64_t) {}
};

template <class T>
void find(const SnellUpdate& update, void* out) {
  Operand<T> u(update, true, true, false);
  const T over_gamma = Softmax<T>(u.theta + u.groups).over_gamma, worst = over_gamma > 0 ? -HUGE_VAL : HUGE_VAL;
  const int64_t padded = u.panels * TILE<T>;
  std::vector<T> tops(u.threads * padded, worst), sums(u.threads * padded);
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
  {
    int t = omp_get_thread_num(), team = omp_get_num_threads();
    Online<T> body{u, over_gamma, &tops[t * padded], &sums[t * padded]};
    sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
  }
  for (int64_t j = 0; j < u.n; ++j) {
    T top = worst, total = 0;
    for (int t = 0; t < u.threads; ++t)
      top = over_gamma > 0 ? std::max(top, tops[t * padded + j]) : std::min(top, tops[t * padded + j]);
    for (int t = 0; t < u.threads; ++t) {
      const T sum = sums[t * padded + j];
      if (sum != 0) total += sum * std::exp((tops[t * padded + j] - top) * over_gamma);
    }
    static_cast<T*>(out)[j] = top + std::log(total) / over_gamma;
  }
}

template <class T>
struct SoftmaxGradBody {
  const Operand<T>& u;
  T over_gamma;
  const T *maxima, *grad;  // padded to whole panels
  T* grad_A;               // this thread's, laid out as packed A is, without norms
  T* grad_B;
  std::vector<Vec<T>> kept, of_rows;  // of_rows [ROWS][rank]: dB of a group of rows, before the lanes are added
  double grad_gamma = 0;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t, int rows, int64_t column, int, const T* panel, const Rows<T>& b) {
    Vec<T> K[ROWS][COLUMNS], H[ROWS][COLUMNS], by_gamma{};
    kappa_tile<Inner>(u, panel, b, K, kept.data());
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) {
        const Vec<T> g = load(grad + column + c * LANES<T>);
        const Vec<T> exponent = (K[r][c] - load(maxima + column + c * LANES<T>)) * over_gamma;
        // Padding has a gradient of 0, and an S that may be infinite.
        H[r][c] = WHOLE || r < rows ? (g == T(0) ? g : g * exp(exponent)) : Vec<T>{};
        by_gamma -= H[r][c] == T(0) ? H[r][c] : H[r][c] * exponent;
      }
    grad_gamma += sum<T>(by_gamma);
    T* moved = grad_A + column * u.rank;
    for (int p = 0; p < u.groups; ++p) {
      Vec<T> C[ROWS][COLUMNS];
      for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) {
          const Vec<T> norm = kept[(p * ROWS + r) * COLUMNS + c];
          C[r][c] = norm == T(0) ? norm : u.theta[p] * H[r][c] / norm;
        }
      for (int64_t k = int64_t(p) * u.width; k < int64_t(p + 1) * u.width; ++k) {
        Vec<T> a[COLUMNS], to[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) {
          a[c] = load(panel + k * TILE<T> + c * LANES<T>);
          to[c] = load(moved + k * TILE<T> + c * LANES<T>);
        }
        for (int r = 0; r < ROWS; ++r) {
          const Vec<T> bk = splat(b.b[r][k]);
          Vec<T> total = of_rows[r * u.rank + k];
          for (int c = 0; c < COLUMNS; ++c) {
            const Vec<T> d = a[c] - bk;
            to[c] = fma(C[r][c], d, to[c]);
            total = fma(-C[r][c], d, total);
          }
          of_rows[r * u.rank + k] = total;
        }
        for (int c = 0; c < COLUMNS; ++c) store(moved + k * TILE<T> + c * LANES<T>, to[c]);
      }
    }
  }
  SNELL_INLINE void ahead(int64_t, int64_t, int64_t) {}
  SNELL_INLINE void flush(int64_t row, int rows, int64_t) {
    for (int r = 0; r < rows; ++r)
      for (int64_t k = 0; k < u.rank; ++k) grad_B[(row + r) * u.rank + k] += sum<T>(of_rows[r * u.rank + k]);
    for (auto& v : of_rows) v = Vec<T>{};
  }
};

template <class T>
void differentiate(const SnellUpdate& update, const void* grad, void* grad_A, void* grad_B, void* grad_gamma) {
  Operand<T> u(update, true, true, false);
  const int64_t padded = u.panels * TILE<T>, size = padded * u.rank;
  std::vector<T> maxima(padded), grads(padded);
  std::copy_n(static_cast<const T*>(update.smooth_max), u.n, maxima.begin());
  std::copy_n(static_cast<const T*>(grad), u.n, grads.begin());
  std::vector<Buffer<T>> parts;
  for (int t = 0; t < u.threads; ++t) {
    parts.push_back(allocate<T>(size));
    std::memset(parts.back().get(), 0, size * sizeof(T));
  }
  std::vector<double> by_gamma(u.threads);
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
  {
    int t = omp_get_thread_num(), team = omp_get_num_threads();
    SoftmaxGradBody<T> body{u, Softmax<T>(u.theta + u.groups).over_gamma, maxima.data(), grads.data(), parts[t].get(),
                            static_cast<T*>(grad_B), {}, {}};
    body.kept.resize(u.groups * ROWS * COLUMNS);
    body.of_rows.resize(ROWS * u.rank);
    sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
    by_gamma[t] = body.grad_gamma;
  }
  // In the order of the threads' rows, so the same number of threads gives the same bits.
  for (auto& part : parts)
    for (int64_t j = 0; j < u.n; ++j)
      for (int64_t k = 0; k < u.rank; ++k)
        static_cast<T*>(grad_A)[j * u.rank + k] += part[(j / TILE<T> * u.rank + k) * TILE<T> + j % TILE<T>];
  double total = 0;
  for (double part : by_gamma) total += part;
  *static_cast<T*>(grad_gamma) += T(total);
}

}  // namespace

void smooth_max(const SnellUpdate& u, void* out) { u.dtype == SNELL_F32 ? find<float>(u, out) : find<double>(u, out); }

void smooth_max_grad(const SnellUpdate& u, const void* grad, void* grad_A, void* grad_B, void* grad_gamma) {
  u.dtype == SNELL_F32 ? differentiate<float>(u, grad, grad_A, grad_B, grad_gamma)
                       : differentiate<double>(u, grad, grad_A, grad_B, grad_gamma);
}

}  // namespace snell::SNELL_ISA
