// Vectors of the instruction set this file is compiled for. They use GCC's vector extension, and intrinsics for what it
// lacks: fused multiply-add, square root, compress, half precision.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../api.h"

#define SNELL_INLINE inline __attribute__((always_inline))

namespace snell::SNELL_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int LANES = VECTOR_BYTES / int(sizeof(T));

using F = Vec<float>;
using D = Vec<double>;
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Mask = Vec<typename IntOf<T>::type>;  // all ones where true: the result of a comparison

template <class T>
SNELL_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // GCC folds this to a broadcast, since x - 0 is x for every x; x + 0 is not x for -0
}
template <class T>
SNELL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
SNELL_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

#if defined(__AVX512F__)
SNELL_INLINE F fma(F a, F b, F c) { return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
SNELL_INLINE D fma(D a, D b, D c) { return D(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c))); }
SNELL_INLINE F sqrt(F a) { return F(_mm512_sqrt_ps(__m512(a))); }
// 2 sqrt(a) for a normal a, within one unit in the last place: a Newton step from the reciprocal root's 14 bits, which
// keeps the divider free.
SNELL_INLINE F twice_sqrt(F a) {
  F reciprocal = F(_mm512_rsqrt14_ps(__m512(a))), root = a * reciprocal;
  return root * fma(-root, reciprocal, splat(3.0f));
}
SNELL_INLINE D sqrt(D a) { return D(_mm512_sqrt_pd(__m512d(a))); }
SNELL_INLINE unsigned bits(Mask<float> m) { return _mm512_movepi32_mask(__m512i(m)); }
SNELL_INLINE unsigned bits(Mask<double> m) { return _mm512_movepi64_mask(__m512i(m)); }
#elif defined(__AVX2__)
SNELL_INLINE F fma(F a, F b, F c) { return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
SNELL_INLINE D fma(D a, D b, D c) { return D(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c))); }
SNELL_INLINE F sqrt(F a) { return F(_mm256_sqrt_ps(__m256(a))); }
SNELL_INLINE D sqrt(D a) { return D(_mm256_sqrt_pd(__m256d(a))); }
SNELL_INLINE unsigned bits(Mask<float> m) { return _mm256_movemask_ps(__m256(m)); }
SNELL_INLINE unsigned bits(Mask<double> m) { return _mm256_movemask_pd(__m256d(m)); }
#else
template <class V>
SNELL_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
SNELL_INLINE V sqrt(V a) {
  for (unsigned l = 0; l < sizeof a / sizeof a[0]; ++l) a[l] = std::sqrt(a[l]);
  return a;
}
template <class M>
SNELL_INLINE unsigned bits(M m) {
  unsigned set = 0;
  for (unsigned l = 0; l < sizeof m / sizeof m[0]; ++l) set |= unsigned(m[l] & 1) << l;
  return set;
}
#endif

// Comparisons as one bit a lane. With NaN the first two are false and `nonzero` is true.
template <class T>
constexpr unsigned ALL = (1u << (LANES<T> - 1) << 1) - 1;
#if defined(__AVX512F__)
SNELL_INLINE unsigned less(F a, F b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_LT_OQ); }
SNELL_INLINE unsigned less(D a, D b) { return _mm512_cmp_pd_mask(__m512d(a), __m512d(b), _CMP_LT_OQ); }
SNELL_INLINE unsigned less_equal(F a, F b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_LE_OQ); }
SNELL_INLINE unsigned less_equal(D a, D b) { return _mm512_cmp_pd_mask(__m512d(a), __m512d(b), _CMP_LE_OQ); }
SNELL_INLINE unsigned nonzero(F a) { return _mm512_cmp_ps_mask(__m512(a), _mm512_setzero_ps(), _CMP_NEQ_UQ); }
SNELL_INLINE unsigned nonzero(D a) { return _mm512_cmp_pd_mask(__m512d(a), _mm512_setzero_pd(), _CMP_NEQ_UQ); }
#else
template <class V>
SNELL_INLINE unsigned nonzero(V a) {
  return bits(a != V{});
}
template <class V>
SNELL_INLINE unsigned less(V a, V b) {
  return bits(a < b);
}
template <class V>
SNELL_INLINE unsigned less_equal(V a, V b) {
  return bits(a <= b);
}
#endif

#if !defined(__AVX512F__)
SNELL_INLINE F twice_sqrt(F a) { return 2 * sqrt(a); }
#endif
SNELL_INLINE D twice_sqrt(D a) { return 2 * sqrt(a); }

// Pack the lanes whose bit is set into `to`. Up to a whole vector from `to` on may be overwritten.
template <class T>
SNELL_INLINE void compress(T* to, Vec<T> v, unsigned set) {
#if defined(__AVX512F__)
  // Compress in a register and store all of it: the compressing store is microcoded on some processors.
  if constexpr (sizeof(T) == 4)
    store(to, Vec<T>(_mm512_maskz_compress_epi32(__mmask16(set), __m512i(v))));
  else
    store(to, Vec<T>(_mm512_maskz_compress_epi64(__mmask8(set), __m512i(v))));
#else
  for (; set; set &= set - 1) *to++ = v[__builtin_ctz(set)];
#endif
}

SNELL_INLINE F abs(F v) { return F(Mask<float>(v) & 0x7fffffff); }
SNELL_INLINE D abs(D v) { return D(Mask<double>(v) & 0x7fffffffffffffff); }

template <class T>
SNELL_INLINE T sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_add_ps(__m512(v));
  else
    return _mm512_reduce_add_pd(__m512d(v));
#else
  T total = 0;
  for (int l = 0; l < LANES<T>; ++l) total += v[l];
  return total;
#endif
}

// exp in float: 2^k times a degree-6 polynomial on [-ln2/2, ln2/2]. The error is below 2 units in the last place.
// Underflow gives 0, overflow gives infinity, NaN gives NaN.
SNELL_INLINE F exp(F x) {
  F clamped = x < 88.8f ? x : splat(88.8f);
  clamped = clamped > -104.0f ? clamped : splat(-104.0f);
  F shifted = fma(clamped, splat(1.44269504088896341f), splat(12582912.0f));
  F k = shifted - 12582912.0f;
  F r = fma(k, splat(-0.693145751953125f), clamped);
  r = fma(k, splat(-1.42860682030941723e-6f), r);
  F p = splat(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
  // 2^k as two factors, so that the result can be a denormal or the largest float.
  Mask<float> whole = Mask<float>(shifted) - 0x4b400000, half = whole >> 1;
  F scale = F((half + 127) << 23), rest = F((whole - half + 127) << 23);
  F y = p * scale * rest;
  y = x > 88.72284f ? splat(HUGE_VALF) : y;
  return x == x ? y : x;
}
SNELL_INLINE D exp(D x) {
  for (int l = 0; l < LANES<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

// ---- the four storage dtypes ------------------------------------------------------------------------------------

SNELL_INLINE float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
SNELL_INLINE uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
SNELL_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u = to_bits(f);
  return f != f ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // a NaN keeps its payload
}
SNELL_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  float value = from_bits(magnitude << 13) * from_bits(0x77800000);  // x 2^112: the biases' difference
  return from_bits(sign | to_bits(value));
}
SNELL_INLINE uint16_t float_to_half(float f) {
  uint32_t u = to_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of the smallest denormal
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

template <class T>
SNELL_INLINE T load_scalar(const void* p, int64_t i, int dtype) {
  switch (dtype) {
    case SNELL_F32: return T(static_cast<const float*>(p)[i]);
    case SNELL_F64: return T(static_cast<const double*>(p)[i]);
    case SNELL_BF16: return T(from_bits(uint32_t(static_cast<const uint16_t*>(p)[i]) << 16));
    default: return T(half_to_float(static_cast<const uint16_t*>(p)[i]));
  }
}
template <class T>
SNELL_INLINE void store_scalar(void* p, int64_t i, int dtype, T value) {
  switch (dtype) {
    case SNELL_F32: static_cast<float*>(p)[i] = float(value); break;
    case SNELL_F64: static_cast<double*>(p)[i] = double(value); break;
    case SNELL_BF16: static_cast<uint16_t*>(p)[i] = float_to_bf16(float(value)); break;
    default: static_cast<uint16_t*>(p)[i] = float_to_half(float(value));
  }
}

typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));

// `count` elements from element i on, converted to T; the remaining lanes are 0.
template <class T>
SNELL_INLINE Vec<T> load_as(const void* p, int64_t i, int dtype, int count) {
  if (count >= LANES<T>) {
    if (dtype == (sizeof(T) == 4 ? SNELL_F32 : SNELL_F64)) return load(static_cast<const T*>(p) + i);
    if constexpr (sizeof(T) == 4) {
      const uint16_t* q = static_cast<const uint16_t*>(p) + i;
      if (dtype == SNELL_BF16) {
        Short s;
        std::memcpy(&s, q, sizeof s);
        return F(__builtin_convertvector(s, Word) << 16);
      }
#if defined(__AVX512F__)
      if (dtype == SNELL_F16) return F(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q))));
#elif defined(__F16C__)
      if (dtype == SNELL_F16) return F(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
#endif
    }
  }
  Vec<T> v{};
  for (int l = 0; l < LANES<T> && l < count; ++l) v[l] = load_scalar<T>(p, i + l, dtype);
  return v;
}

template <class T>
SNELL_INLINE void store_as(void* p, int64_t i, int dtype, int count, Vec<T> v) {
  if (count >= LANES<T>) {
    if (dtype == (sizeof(T) == 4 ? SNELL_F32 : SNELL_F64)) return store(static_cast<T*>(p) + i, v);
    if constexpr (sizeof(T) == 4) {
      uint16_t* q = static_cast<uint16_t*>(p) + i;
      if (dtype == SNELL_BF16) {
        Word u = Word(v);
        u = v == v ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 0x40;
        Short s = __builtin_convertvector(u, Short);
        std::memcpy(q, &s, sizeof s);
        return;
      }
#if defined(__AVX512F__)
      if (dtype == SNELL_F16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_cvtps_ph(__m512(v), 0));
#elif defined(__F16C__)
      if (dtype == SNELL_F16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm256_cvtps_ph(__m256(v), 0));
#endif
    }
  }
  for (int l = 0; l < LANES<T> && l < count; ++l) store_scalar<T>(p, i + l, dtype, v[l]);
}

}  // namespace snell::SNELL_ISA
