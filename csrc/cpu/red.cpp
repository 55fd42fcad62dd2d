// Representation editing: z = scaling * u + bias, and its gradients in one reading of the output's gradient and of u.
#include "tiles.h"

namespace snell::SNELL_ISA {

// Fewer numbers than these do not repay waking a thread.
constexpr int64_t NUMBERS_A_THREAD = 1 << 15;

// Rows are summed in slabs, and slabs in order. Slabs depend on the number of rows alone, so that the sums do not depend
// on the number of threads. At most SLABS of them bound the workspace.
constexpr int64_t SLAB_ROWS = 32, SLABS = 256;

// Rows that share one read and write of the sums.
constexpr int TOGETHER = 4;

static int edit_threads(const SnellEdit& e) {
  return int(std::clamp<int64_t>(e.tokens * e.m / NUMBERS_A_THREAD, 1, e.threads));
}

template <class T>
void edit_as(const SnellEdit& e, void* z) {
  const int threads = edit_threads(e);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < e.tokens; ++row)
    for (int64_t j = 0; j < e.m; j += LANES<T>) {
      const int count = int(std::min<int64_t>(LANES<T>, e.m - j));
      Vec<T> s = load_as<T>(e.scaling, j, e.vector_dtype, count), c = load_as<T>(e.bias, j, e.vector_dtype, count);
      store_as<T>(z, row * e.m + j, e.dtype, count, load_as<T>(e.u, row * e.m + j, e.dtype, count) * s + c);
    }
}

// For `ROWS_` rows from `row` on: grad_u, and the sums of grad * u and of grad.
template <class T, int ROWS_>
SNELL_INLINE void edit_grad_rows(const SnellEdit& e, int64_t row, void* grad_u, T* sum_scaling, T* sum_bias) {
  for (int64_t j = 0; j < e.m; j += LANES<T>) {
    const int count = int(std::min<int64_t>(LANES<T>, e.m - j));
    const Vec<T> s = load_as<T>(e.scaling, j, e.vector_dtype, count);
    Vec<T> ds = load(sum_scaling + j), dc = load(sum_bias + j);
    for (int r = 0; r < ROWS_; ++r) {
      const int64_t at = (row + r) * e.m + j;
      const Vec<T> g = load_as<T>(e.grad, at, e.dtype, count);
      if (e.u) ds += g * load_as<T>(e.u, at, e.dtype, count);
      dc += g;
      if (grad_u) store_as<T>(grad_u, at, e.dtype, count, g * s);
    }
    store(sum_scaling + j, ds);
    store(sum_bias + j, dc);
  }
}

template <class T>
void edit_grad_as(const SnellEdit& e, void* grad_u, void* grad_scaling, void* grad_bias) {
  const int threads = edit_threads(e);
  const int64_t width = (e.m + LANES<T> - 1) / LANES<T> * LANES<T>;
  const int64_t rows = std::max(SLAB_ROWS, (e.tokens + SLABS - 1) / SLABS), slabs = (e.tokens + rows - 1) / rows;
  Buffer<T> sums = allocate<T>(slabs * 2 * width);  // [slab][scaling, bias][width]
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t slab = 0; slab < slabs; ++slab) {
    T *sum_scaling = &sums[slab * 2 * width], *sum_bias = sum_scaling + width;
    std::memset(sum_scaling, 0, 2 * width * sizeof(T));
    int64_t row = slab * rows;
    const int64_t last = std::min(row + rows, e.tokens);
    for (; row + TOGETHER <= last; row += TOGETHER)
      edit_grad_rows<T, TOGETHER>(e, row, grad_u, sum_scaling, sum_bias);
    for (; row < last; ++row) edit_grad_rows<T, 1>(e, row, grad_u, sum_scaling, sum_bias);
  }
  for (int64_t j = 0; j < e.m; j += LANES<T>) {
    const int count = int(std::min<int64_t>(LANES<T>, e.m - j));
    Vec<T> ds{}, dc{};
    for (int64_t slab = 0; slab < slabs; ++slab) {
      ds += load(&sums[slab * 2 * width + j]);
      dc += load(&sums[slab * 2 * width + width + j]);
    }
    if (grad_scaling) store_as<T>(grad_scaling, j, e.vector_dtype, count, ds);
    if (grad_bias) store_as<T>(grad_bias, j, e.vector_dtype, count, dc);
  }
}

void edit(const SnellEdit& e, void* z) { e.vector_dtype == SNELL_F32 ? edit_as<float>(e, z) : edit_as<double>(e, z); }

void edit_grad(const SnellEdit& e, void* grad_u, void* grad_scaling, void* grad_bias) {
  auto run = e.vector_dtype == SNELL_F32 ? edit_grad_as<float> : edit_grad_as<double>;
  run(e, grad_u, grad_scaling, grad_bias);
}

}  // namespace snell::SNELL_ISA
