// select: tau = the k-th smallest |K|, exact, without storing K.
//
// A random sample brackets tau to +-4 standard deviations. One pass over K counts the magnitudes below the bracket and
// gathers those inside, and tau is picked from these. If the bracket misses (about 1 time in 10,000) or holds too many
// (ties), radix passes over the bits of |K| find tau in bounded memory.
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "tiles.h"

namespace snell::SNELL_ISA {
namespace {

constexpr int RADIX_BITS = 11;
constexpr int64_t GATHER_ALL = 1 << 15;  // up to this many entries, gather all: a sample would cost more
// A thread that gathers more than GATHER_MIN + GATHER_SLACK x the expected number leaves the rest to the radix passes.
constexpr double GATHER_SLACK = 2.0;
constexpr int64_t GATHER_MIN = 1 << 16;

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr int width = 31;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr int width = 63;
};

uint64_t mix(uint64_t x) {  // splitmix64: a counter becomes a random number
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

int64_t below(uint64_t random, int64_t bound) { return int64_t(uint64_t((unsigned __int128)random * bound >> 64)); }

// Gathers the magnitudes within [lo, hi] and counts those below lo.
template <class KF, class T>
struct Gather {
  const Operand<T>* u;
  T lo, hi;
  int64_t limit, below = 0, used = 0;
  std::vector<T> inside;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t, int rows, int64_t, int columns, const T* panel, const Rows<T>& b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<KF>(*u, panel, b, K);
    for (int r = 0; r < (WHOLE ? ROWS : rows); ++r)
      for (int c = 0; c < COLUMNS; ++c) {
        int count = columns - c * LANES<T>;
        unsigned valid = WHOLE || count >= LANES<T> ? ALL<T> : count > 0 ? (1u << count) - 1 : 0u;
        Vec<T> a = abs(K[r][c]);
        const unsigned under = less(a, splat(lo)) & valid;
        below += __builtin_popcount(under);
        unsigned in = less_equal(a, splat(hi)) & valid & ~under;
        if (in && used <= limit) {
          if (size_t(used + LANES<T>) > inside.size()) inside.resize(inside.size() * 3 / 2 + 4096);
          compress(&inside[used], a, in);
          used += __builtin_popcount(in);
        }
      }
  }
  SNELL_INLINE void ahead(int64_t, int64_t, int64_t) {}
  SNELL_INLINE void flush(int64_t, int, int64_t) {}
};

// Histogram of one digit of the keys whose higher bits equal the prefix.
template <class KF, class T>
struct Histogram {
  using Key = typename Bits<T>::type;
  const Operand<T>* u;
  Key prefix;
  int above, shift, digits;
  std::vector<int64_t> counts;

  template <bool WHOLE>
  SNELL_INLINE void tile(int64_t, int rows, int64_t, int columns, const T* panel, const Rows<T>& b) {
    Vec<T> K[ROWS][COLUMNS];
    kappa_tile<KF>(*u, panel, b, K);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        T a = abs(K[r][c / LANES<T>])[c % LANES<T>];
        Key key;
        std::memcpy(&key, &a, sizeof a);
        if (key >> (above - 1) >> 1 == prefix) ++counts[key >> shift & (digits - 1)];
      }
  }
  SNELL_INLINE void ahead(int64_t, int64_t, int64_t) {}
  SNELL_INLINE void flush(int64_t, int, int64_t) {}
};

template <class T, class Body>
void sweep_all(const Operand<T>& u, std::vector<Body>& bodies) {
#pragma omp parallel num_threads(u.threads) if (u.threads > 1)
  {
    int t = omp_get_thread_num(), team = omp_get_num_threads();
    Body body = std::move(bodies[t]);  // on the thread's own stack, to avoid false sharing of the counters
    sweep(u, u.first_row(t, team), u.first_row(t + 1, team), body);
    bodies[t] = std::move(body);
  }
}

template <class KF, class T>
T radix_select(const Operand<T>& u, int64_t k) {
  using Key = typename Bits<T>::type;
  Key prefix = 0;
  for (int top = Bits<T>::width; top > 0; top -= RADIX_BITS) {
    int shift = std::max(top - RADIX_BITS, 0), digits = 1 << (top - shift);
    std::vector<Histogram<KF, T>> bodies(u.threads, {&u, prefix, top, shift, digits, std::vector<int64_t>(digits)});
    sweep_all(u, bodies);
    std::vector<int64_t> counts(digits);
    for (auto& body : bodies)
      for (int digit = 0; digit < digits; ++digit) counts[digit] += body.counts[digit];
    // If another thread changes the factors between two passes, fewer than k keys may have the prefix. Then take the
    // largest of them, or the prefix's smallest key if there is none: neither exceeds a counted |K|.
    k = std::min(k, std::accumulate(counts.begin(), counts.end(), int64_t(0)));
    int digit = 0;
    for (; k > counts[digit]; ++digit) k -= counts[digit];
    prefix = prefix << (top - shift) | Key(digit);
  }
  T tau;
  std::memcpy(&tau, &prefix, sizeof tau);
  return tau;
}

// |K| of one random entry, in plain arithmetic: the sample need not match K bit for bit.
template <class KF, class T>
T sample_one(const Operand<T>& u, int64_t counter) {
  const int64_t column = below(mix(2 * counter), u.n), row = below(mix(2 * counter + 1), u.m);
  const T *a = u.A + column * u.rank, *b = u.B + row * u.rank;
  Vec<T> K{};
  for (int p = 0; p < u.groups; ++p) {
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t k = p * u.width; k < (p + 1) * int64_t(u.width); ++k) {
      T d = KF::distance ? a[k] - b[k] : T(0);
      s += KF::distance ? d * d : a[k] * b[k];
    }
    K = KF::add_group(u.theta, p, splat(KF::root ? std::sqrt(s) : s), K);
  }
  if constexpr (KF::softmax) {
    const Softmax<T> softmax(u.theta + u.groups);
    K = softmax.value((K - (u.row_max ? u.row_max[row] : u.column_max[column])) * softmax.over_gamma, K);
  }
  return std::abs(K[0]);
}

template <class T>
struct Bracket {
  T lo, hi;
  double share;  // of all entries that are expected inside
};

template <class KF, class T>
Bracket<T> bracket(const Operand<T>& u, int64_t k) {
  const T infinity = std::numeric_limits<T>::infinity();
  double entries = double(u.m) * double(u.n);
  if (entries <= GATHER_ALL) return {T(0), infinity, 1.0};
  // A larger sample costs more but narrows the bracket, so fewer entries are gathered. entries^(2/3) balances these.
  int64_t size = int64_t(std::pow(0.4 * entries, 2.0 / 3.0));
  auto sample = allocate<T>(size);
#pragma omp parallel for num_threads(u.threads) schedule(static) if (u.threads > 1)
  for (int64_t i = 0; i < size; ++i) {
    T a = sample_one<KF>(u, i);
    sample[i] = a == a ? a : infinity;
  }
  double q = double(k) / entries, margin = 4 * std::sqrt(q * (1 - q) / size) + 2.0 / size;
  int64_t lower = int64_t((q - margin) * size), upper = int64_t((q + margin) * size) + 1;
  auto ranked = [&](int64_t from, int64_t rank) {
    std::nth_element(&sample[from], &sample[rank], &sample[size]);
    return sample[rank];
  };
  T lo = lower > 0 ? ranked(0, lower) : T(0);
  T hi = upper < size ? ranked(std::max<int64_t>(lower, 0), upper) : infinity;
  return {lo, hi, 2 * margin};
}

// The k-th smallest (k from 1), in any order of `values`. Counting in buckets first leaves few values to order.
template <class T>
T ranked(std::vector<T>& values, int64_t k) {
  constexpr int BUCKETS = 1024;
  const auto [lo, hi] = std::minmax_element(values.begin(), values.end());
  const T low = *lo, scale = (BUCKETS - 1) / (*hi - low);
  size_t kept = values.size();
  if (kept > BUCKETS && std::isnormal(scale)) {  // it is 0 if a value is infinite
    auto bucket = [=](T value) { return int((value - low) * scale); };  // monotonic, so buckets are in order
    int64_t counts[BUCKETS] = {};
    for (T value : values) ++counts[bucket(value)];
    int b = 0;
    for (; k > counts[b]; ++b) k -= counts[b];
    kept = 0;
    for (T value : values) {  // no branch, which would be hard to predict
      values[kept] = value;
      kept += bucket(value) == b;
    }
  }
  std::nth_element(values.begin(), values.begin() + (k - 1), values.begin() + kept);
  return values[k - 1];
}

// Each thread's magnitudes within [lo, hi]; room is made for `expected` of them.
template <class KF, class T>
std::vector<Gather<KF, T>> gather(const Operand<T>& u, T lo, T hi, int64_t limit, double expected) {
  std::vector<Gather<KF, T>> bodies(u.threads, {&u, lo, hi, limit, 0, 0, {}});
  for (auto& body : bodies) body.inside.reserve(size_t(1.1 * expected) + 4096);
  bodies[0].inside.reserve(size_t(1.1 * expected * u.threads) + 4096);  // the others may be appended to it
  sweep_all(u, bodies);
  for (auto& body : bodies) body.inside.resize(body.used);
  return bodies;
}

}  // namespace

template <class KF, class T>
struct Select {
  static void run(const SnellUpdate& update, int64_t k, void* tau) {
    Operand<T> u(update, KF::grouped, KF::distance, KF::softmax);
    auto [lo, hi, share] = bracket<KF>(u, k);
    double expected = share * double(u.m) * double(u.n) / u.threads;
    int64_t limit = GATHER_MIN + int64_t(GATHER_SLACK * expected);
    auto bodies = gather<KF>(u, lo, hi, limit, expected);
    bool overflow = false;
    for (auto& body : bodies) {
      overflow |= body.used > limit;
      k -= body.below;
      if (&body != &bodies[0]) bodies[0].inside.insert(bodies[0].inside.end(), body.inside.begin(), body.inside.end());
    }
    auto& inside = bodies[0].inside;
    if (overflow || k < 1 || k > int64_t(inside.size())) {
      for (auto& body : bodies) k += body.below;
      inside = {};
      *static_cast<T*>(tau) = radix_select<KF>(u, k);
    } else {
      *static_cast<T*>(tau) = ranked(inside, k);
    }
  }
};

template <class KF, class T>
struct Density {
  static void run(const SnellUpdate& update, int64_t samples, double* density) {
    Operand<T> u(update, KF::grouped, KF::distance, KF::softmax);
    int64_t survivors = 0;
    for (int64_t i = 0; i < samples; ++i) survivors += !(sample_one<KF>(u, i) <= u.tau);
    *density = u.gate == GATE_NONE ? 1.0 : double(survivors) / double(samples);
  }
};

// |K| of entries `first` to `last` of an endless random sample.
template <class KF, class T>
struct Sample {
  static void run(const SnellUpdate& update, int64_t first, int64_t last, void* out) {
    Operand<T> u(update, KF::grouped, KF::distance, KF::softmax);
#pragma omp parallel for num_threads(u.threads) schedule(static) if (u.threads > 1)
    for (int64_t i = first; i < last; ++i) static_cast<T*>(out)[i - first] = sample_one<KF>(u, i);
  }
};

// Magnitudes within [bounds[0], bounds[1]], in any order, and in `counts` how many are below and how many within. If
// these are more than `limit`, nothing is written.
template <class KF, class T>
struct Within {
  static void run(const SnellUpdate& update, const void* bounds, int64_t limit, void* out, int64_t* counts) {
    Operand<T> u(update, KF::grouped, KF::distance, KF::softmax);
    const T* ends = static_cast<const T*>(bounds);
    auto bodies = gather<KF>(u, ends[0], ends[1], limit, 0.0);
    counts[0] = counts[1] = 0;
    for (auto& body : bodies) {
      counts[0] += body.below;
      counts[1] += body.used;
    }
    if (counts[1] > limit) return;
    T* to = static_cast<T*>(out);
    for (auto& body : bodies) to = std::copy(body.inside.begin(), body.inside.end(), to);
  }
};

void sample(const SnellUpdate& u, int64_t first, int64_t last, void* out) { dispatch<Sample>(u, first, last, out); }

void within(const SnellUpdate& u, const void* bounds, int64_t limit, void* out, int64_t* counts) {
  dispatch<Within>(u, bounds, limit, out, counts);
}

void density(const SnellUpdate& u, int64_t samples, double* share) { dispatch<Density>(u, samples, share); }

void select(const SnellUpdate& u, int64_t k, void* tau) { dispatch<Select>(u, k, tau); }

}  // namespace snell::SNELL_ISA
