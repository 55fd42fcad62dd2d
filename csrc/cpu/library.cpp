// The C interface. It picks the instruction set once and turns exceptions into a status. An exception inside a parallel
// region still ends the process: OpenMP does not let it leave the region.
#include <cstdlib>
#include <cstring>

#include "kappa.h"

#define SNELL_EXPORT extern "C" __attribute__((visibility("default")))

#define SNELL_DECLARE(isa)                                                                                     \
  namespace snell::isa {                                                                                       \
  void merge(const SnellUpdate&, const SnellUpdate*, const SnellMatrix*, const SnellMatrix*);                  \
  void select(const SnellUpdate&, int64_t, void*);                                                             \
  void density(const SnellUpdate&, int64_t, double*);                                                          \
  void sample(const SnellUpdate&, int64_t, int64_t, void*);                                                    \
  void within(const SnellUpdate&, const void*, int64_t, void*, int64_t*);                                      \
  void factor_grad(const SnellUpdate&, const SnellUpdate*, const SnellMatrix*, const SnellTokens*,             \
                   const SnellMatrix*, const SnellMatrix*, void*, void*, void*, void*);                        \
  void smooth_max(const SnellUpdate&, void*);                                                                  \
  void smooth_max_grad(const SnellUpdate&, const void*, void*, void*, void*);                                  \
  void edit(const SnellEdit&, void*);                                                                          \
  void edit_grad(const SnellEdit&, void*, void*, void*);                                                       \
  }
#define SNELL_TABLE(isa)                                                                                        \
  {#isa, snell::isa::merge, snell::isa::select, snell::isa::density, snell::isa::factor_grad, snell::isa::edit, \
   snell::isa::edit_grad, snell::isa::smooth_max, snell::isa::smooth_max_grad, snell::isa::sample,              \
   snell::isa::within}

SNELL_DECLARE(base)
#ifdef SNELL_HAVE_V3
SNELL_DECLARE(v3)
#endif
#ifdef SNELL_HAVE_V4
SNELL_DECLARE(v4)
#endif

namespace {

struct Table {
  const char* name;
  decltype(&snell::base::merge) merge;
  decltype(&snell::base::select) select;
  decltype(&snell::base::density) density;
  decltype(&snell::base::factor_grad) factor_grad;
  decltype(&snell::base::edit) edit;
  decltype(&snell::base::edit_grad) edit_grad;
  decltype(&snell::base::smooth_max) smooth_max;
  decltype(&snell::base::smooth_max_grad) smooth_max_grad;
  decltype(&snell::base::sample) sample;
  decltype(&snell::base::within) within;
};

// The best instruction set of this machine. SNELL_ISA selects a lower one, so that one machine can test all of them.
Table choose() {
  const char* wanted = std::getenv("SNELL_ISA");
  auto allowed = [&](const char* name) { return !wanted || !std::strcmp(wanted, name); };
  (void)allowed;
#ifdef SNELL_HAVE_V4
  if (allowed("v4") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return SNELL_TABLE(v4);
#endif
#ifdef SNELL_HAVE_V3
  if (allowed("v3") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
    return SNELL_TABLE(v3);
#endif
  return SNELL_TABLE(base);
}

const Table table = choose();

template <class Function>
int guarded(Function function) {
  try {
    function();
    return 0;
  } catch (...) {
    return 1;  // std::bad_alloc is the only exception thrown here
  }
}

}  // namespace

SNELL_EXPORT const char* snell_isa() { return table.name; }

// Names of the kernel functions and gates in the order of their positions, separated by commas.
#define SNELL_NAME(name, ...) "," name
SNELL_EXPORT const char* snell_kernel_functions() { return &(SNELL_KERNEL_FUNCTIONS(SNELL_NAME))[1]; }
SNELL_EXPORT const char* snell_gates() { return &(SNELL_GATES(SNELL_NAME))[1]; }

SNELL_EXPORT int snell_merge(const SnellUpdate* u, const SnellUpdate* start, const SnellMatrix* weight,
                             const SnellMatrix* out) {
  return guarded([&] { table.merge(*u, start, weight, out); });
}

SNELL_EXPORT int snell_select(const SnellUpdate* u, int64_t k, void* tau) {
  return guarded([&] { table.select(*u, k, tau); });
}

// The share of entries that survive, estimated from `samples` random entries.
SNELL_EXPORT int snell_density(const SnellUpdate* u, int64_t samples, double* density) {
  return guarded([&] { table.density(*u, samples, density); });
}

// |K| of entries first to last of an endless random sample.
SNELL_EXPORT int snell_sample(const SnellUpdate* u, int64_t first, int64_t last, void* out) {
  return guarded([&] { table.sample(*u, first, last, out); });
}

// The |K| within [bounds[0], bounds[1]], in any order; counts [2]: how many are below the bounds and how many within. If
// more than `limit` are within, none is written.
SNELL_EXPORT int snell_within(const SnellUpdate* u, const void* bounds, int64_t limit, void* out, int64_t* counts) {
  return guarded([&] { table.within(*u, bounds, limit, out, counts); });
}

SNELL_EXPORT int snell_factor_grad(const SnellUpdate* u, const SnellUpdate* start, const SnellMatrix* G,
                                   const SnellTokens* activations, const SnellMatrix* weight, const SnellMatrix* merged,
                                   void* grad_A, void* grad_B, void* grad_theta, void* grad_max) {
  return guarded(
      [&] { table.factor_grad(*u, start, G, activations, weight, merged, grad_A, grad_B, grad_theta, grad_max); });
}

// The smooth maximum of each column of the K under the update's softmax, [n].
SNELL_EXPORT int snell_smooth_max(const SnellUpdate* u, void* out) {
  return guarded([&] { table.smooth_max(*u, out); });
}

// Adds to the gradients of A, B and gamma, from `grad` [n] of the smooth maxima that the update has.
SNELL_EXPORT int snell_smooth_max_grad(const SnellUpdate* u, const void* grad, void* grad_A, void* grad_B,
                                       void* grad_gamma) {
  return guarded([&] { table.smooth_max_grad(*u, grad, grad_A, grad_B, grad_gamma); });
}

namespace {

// Squares of 16 x 16 pass through a buffer, so that both matrices are read and written by whole cache lines.
template <class T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to, int threads) {
  constexpr int64_t SIDE = SNELL_TOKENS;
  const int64_t padded = (rows + SIDE - 1) / SIDE * SIDE;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * columns >= 1 << 16)
  for (int64_t first = 0; first < columns; first += SIDE)
    for (int64_t row = 0; row < rows; row += SIDE) {
      const int64_t height = rows - row < SIDE ? rows - row : SIDE, width = columns - first < SIDE ? columns - first : SIDE;
      T square[SIDE][SIDE];
      for (int64_t i = 0; i < height; ++i) std::memcpy(square[i], from + (row + i) * stride + first, width * sizeof(T));
      for (int64_t j = 0; j < width; ++j) {
        T* line = to + (first + j) * padded + row;
        for (int64_t i = 0; i < SIDE; ++i) line[i] = i < height ? square[i][j] : T(0);
      }
    }
}

}  // namespace

// out = the transpose of a matrix [rows, columns] of F32 or F64. Its rows are padded with zeros to a multiple of
// SNELL_TOKENS.
SNELL_EXPORT void snell_transpose(const SnellMatrix* matrix, int64_t rows, int64_t columns, void* out, int threads) {
  if (matrix->dtype == SNELL_F32)
    transpose(static_cast<const float*>(matrix->data), matrix->stride, rows, columns, static_cast<float*>(out), threads);
  else
    transpose(static_cast<const double*>(matrix->data), matrix->stride, rows, columns, static_cast<double*>(out), threads);
}

SNELL_EXPORT int snell_edit(const SnellEdit* e, void* z) {
  return guarded([&] { table.edit(*e, z); });
}

// Null results are not wanted.
SNELL_EXPORT int snell_edit_grad(const SnellEdit* e, void* grad_u, void* grad_scaling, void* grad_bias) {
  return guarded([&] { table.edit_grad(*e, grad_u, grad_scaling, grad_bias); });
}

// A 128-bit hash of tensors: four lanes of multiply and fold. At the end each lane is mixed into its neighbour, so that
// a change seen by one lane changes both halves of the digest.
SNELL_EXPORT void snell_fingerprint(int count, const void* const* data, const int64_t* bytes, uint64_t* digest) {
  uint64_t lanes[4] = {1, 2, 3, 4}, words[4];
  auto absorb = [&] {
    for (int l = 0; l < 4; ++l) {
      unsigned __int128 product = (unsigned __int128)(lanes[l] ^ words[l]) * 0x9e3779b97f4a7c15;
      lanes[l] = (uint64_t(product) ^ uint64_t(product >> 64)) + words[l] + 0xd1b54a32d192ed03;
    }
  };
  for (int i = 0; i < count; ++i) {
    const unsigned char* p = static_cast<const unsigned char*>(data[i]);
    int64_t left = bytes[i];
    for (; left >= 32; left -= 32, p += 32) {
      std::memcpy(words, p, 32);
      absorb();
    }
    std::memset(words, 0, 32);
    words[3] = uint64_t(left) << 56;  // fewer than 32 bytes are left: the last byte holds their number
    if (left) std::memcpy(words, p, size_t(left));  // an empty tensor has no address
    absorb();
  }
  for (int l = 0; l < 4; ++l) words[l] = lanes[(l + 1) % 4];
  absorb();
  digest[0] = lanes[0] ^ (lanes[2] << 29 | lanes[2] >> 35);
  digest[1] = lanes[1] ^ (lanes[3] << 31 | lanes[3] >> 33);
}
