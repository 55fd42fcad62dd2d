// The kernel functions: a pair statistic per group of the rank axis, then a scalar function of the statistics.
//
// K and the gate are computed only here, with the same operations in the same order whatever the tile. select, merge
// and factor_grad therefore compute bit-identical K and keep the same entries.
#pragma once
#include "simd.h"

namespace snell::SNELL_ISA {

// The statistic of a pair is a dot product b . a, a squared distance |b - a|^2 or its root. `accumulate` adds one rank
// column.
struct Dot {
  static constexpr bool distance = false, root = false, softmax = false;
  template <class V>
  static SNELL_INLINE V accumulate(V a, V b, V sum) {
    return fma(a, b, sum);
  }
};
struct SquaredDistance {
  static constexpr bool distance = true, root = false, softmax = false;
  template <class V>
  static SNELL_INLINE V accumulate(V a, V b, V sum) {
    V d = a - b;
    return fma(d, d, sum);
  }
};

struct Norm : SquaredDistance {
  static constexpr bool root = true;
};

// Each kernel function names its statistic and, for vectors of pairs:
//   grouped                                whether it has one statistic per group, or one for the whole rank axis
//   scalars                                how many entries of theta belong to each statistic
//   add_group(theta, p, statistic, K)      K of groups 0 to p, given K of those before
//   slope(theta, p, statistic, H, dtheta)  C = H * dkappa/d(statistic), times 2 for a squared distance and divided by a
//                                          norm, so that dB_i += C (b - a) or C a; adds H * dkappa/dtheta to dtheta[]
// theta is an array of scalars.
struct PiecewiseLinear : Norm {
  static constexpr bool grouped = true;
  static constexpr int scalars = 1;
  template <class T, class V>
  static SNELL_INLINE V add_group(const T* theta, int p, V norm, V K) {
    return fma(splat(theta[p]), norm, K);
  }
  template <class T>
  static SNELL_INLINE Vec<T> slope(const T* theta, int p, Vec<T> norm, Vec<T> H, Vec<T>* dtheta) {
    dtheta[p] += H * norm;
    return norm == T(0) ? norm : theta[p] * H / norm;
  }
};

// K + alpha S + beta, where S is the softmax of K / gamma over each column: exp of the exponent (K - L) / gamma, with the
// column's smooth maximum L. theta is the inner function's, which is not trained, then alpha, beta and gamma.
template <class T>
struct Softmax {
  T alpha, beta, over_gamma;

  explicit Softmax(const T* scalars) : alpha(scalars[0]), beta(scalars[1]) {
    const T least = T(0x1p-20), gamma = scalars[2];  // GAMMA_LEAST of kernel_functions.py
    over_gamma = 1 / (std::abs(gamma) < least ? (gamma < 0 ? -least : least) : gamma);
  }
  SNELL_INLINE Vec<T> value(Vec<T> exponent, Vec<T> K) const {
    return fma(splat(alpha), exp(exponent), K) + beta;
  }
  // H times the slope by K; adds those by alpha, beta and gamma to dtheta[], and sets that by L.
  SNELL_INLINE Vec<T> slope(Vec<T> exponent, Vec<T> H, Vec<T>* dtheta, Vec<T>& by_max) const {
    const Vec<T> unit = H * exp(exponent), inner = alpha * over_gamma * unit;
    dtheta[0] += unit;
    dtheta[1] += H;
    dtheta[2] -= inner * exponent;
    by_max = -inner;
    return H + inner;
  }
};

struct Mixture : PiecewiseLinear {
  static constexpr bool softmax = true;
};

struct Linear : Dot {
  static constexpr bool grouped = false;
  static constexpr int scalars = 0;
  template <class T, class V>
  static SNELL_INLINE V add_group(const T*, int, V statistic, V) {
    return statistic;
  }
  template <class T>
  static SNELL_INLINE Vec<T> slope(const T*, int, Vec<T>, Vec<T> H, Vec<T>*) {
    return H;
  }
};

struct Sigmoid : Dot {
  static constexpr bool grouped = false;
  static constexpr int scalars = 3;
  template <class T, class V>
  static SNELL_INLINE V add_group(const T* theta, int, V statistic, V) {
    return fma(splat(theta[0]), T(1) / (T(1) + exp(-theta[1] * statistic)), splat(theta[2]));
  }
  template <class T>
  static SNELL_INLINE Vec<T> slope(const T* theta, int, Vec<T> dot, Vec<T> H, Vec<T>* dtheta) {
    Vec<T> unit = T(1) / (T(1) + exp(-theta[1] * dot));
    Vec<T> inner = theta[0] * H * unit * (T(1) - unit);
    dtheta[0] += H * unit;
    dtheta[1] += inner * dot;
    dtheta[2] += H;
    return theta[1] * inner;
  }
};

struct Rbf : SquaredDistance {
  static constexpr bool grouped = false;
  static constexpr int scalars = 3;
  template <class T, class V>
  static SNELL_INLINE V add_group(const T* theta, int, V statistic, V) {
    return fma(splat(theta[0]), exp(-theta[1] * statistic), splat(theta[2]));
  }
  template <class T>
  static SNELL_INLINE Vec<T> slope(const T* theta, int, Vec<T> square, Vec<T> H, Vec<T>* dtheta) {
    Vec<T> unit = exp(-theta[1] * square);
    Vec<T> inner = -theta[0] * H * unit;
    dtheta[0] += H * unit;
    dtheta[1] += inner * square;
    dtheta[2] += H;
    return T(2) * theta[1] * inner;
  }
};

// Callers pass a kernel function as a position in this list. A new one is a struct above and a line here.
#define SNELL_KERNEL_FUNCTIONS(ROW)        \
  ROW("piecewise_linear", PiecewiseLinear) \
  ROW("linear", Linear)                    \
  ROW("sigmoid", Sigmoid)                  \
  ROW("rbf", Rbf)                          \
  ROW("mixture", Mixture)

// The same for gates. A new gate is a line here and one in gate_of.
#define SNELL_GATES(ROW)            \
  ROW("soft", GATE_SOFT)            \
  ROW("magnitude", GATE_MAGNITUDE)  \
  ROW("hard", GATE_HARD)            \
  ROW("none", GATE_NONE)

#define SNELL_KERNEL(name, KF) KERNEL_##KF,
#define SNELL_GATE(name, gate) gate,
enum Kernel : int32_t { SNELL_KERNEL_FUNCTIONS(SNELL_KERNEL) };
enum Gate : int32_t { SNELL_GATES(SNELL_GATE) };
#undef SNELL_KERNEL
#undef SNELL_GATE

// gate(|K|): 0 if |K| <= tau, NaN if |K| is NaN.
template <class T>
SNELL_INLINE Vec<T> gate_of(Vec<T> magnitude, T tau, int gate) {
  if (gate == GATE_NONE) return splat(T(1));
  Vec<T> value = magnitude;
  if (gate == GATE_SOFT) value = magnitude - tau;
  if (gate == GATE_HARD) value = magnitude == magnitude ? splat(T(1)) : magnitude;
  return magnitude <= tau ? Vec<T>{} : value;
}

}  // namespace snell::SNELL_ISA
