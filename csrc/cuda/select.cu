// select: tau, the k-th smallest |K| of each layer, without the matrix. Algorithm, state and memo are those of
// kernels/select.py and kernels/count.py. A tile's factors lie in shared memory, and each thread holds 16 entries of K in
// registers. One call launches everything.
#include "api.h"
#include "bracket.cuh"

namespace snell {
namespace {

constexpr int THREADS = 256, TALL = 4, WIDE = 4;
constexpr int ROWS = 64, COLUMNS = 64, DEPTH = 32;   // of a tile, and rank columns in shared memory at a time
constexpr int BUCKET = 2048;                         // keys that a bucket may keep

struct Stage {
  alignas(16) float b[DEPTH][ROWS], a[DEPTH][COLUMNS];
};

struct Decision {
  Search search;
  int keys[BUCKET], answer;
};

struct Shared {
  union {
    Stage stage;
    unsigned inside[ROWS * COLUMNS];
    Decision decision;
  };
  int used;
  int64_t arrived;
};

struct Counts {
  unsigned below = 0, at_lo = 0, at_hi = 0;
};

// Rows and columns of this thread's entries in the tile: factors come from shared memory 16 bytes at a time.
__device__ __forceinline__ int row_of(int r) { return threadIdx.x / (COLUMNS / WIDE) * TALL + r; }
__device__ __forceinline__ int column_of(int c) { return threadIdx.x % (COLUMNS / WIDE) * WIDE + c; }

// Where a tile begins, and how much of it lies inside the matrix.
struct Tile {
  int64_t row, column;
  int rows, columns;

  __device__ Tile(const SnellSelect& s, int tile, int across)
      : row(int64_t(tile / across) * ROWS), column(int64_t(tile % across) * COLUMNS) {
    rows = s.m - row < ROWS ? int(s.m - row) : ROWS;
    columns = s.n - column < COLUMNS ? int(s.n - column) : COLUMNS;
  }
};

// `depth` rank columns of one factor's rows, from the first of the tile's; zeros beyond the matrix.
template <int SIZE>
__device__ __forceinline__ void load(float (&into)[DEPTH][SIZE], const float* from, int64_t stride, int depth,
                                     int inside) {
  const int i = threadIdx.x % SIZE;
  for (int k = threadIdx.x / SIZE; k < depth; k += THREADS / SIZE)
    into[k][i] = i < inside ? from[k * stride + i] : 0.0f;
}

// This thread's entries of the tile.
template <int KERNEL>
__device__ __forceinline__ void kappa_tile(const SnellSelect& s, const Layer& layer, Stage& stage, const Tile& tile,
                                           float (&K)[TALL][WIDE]) {
  const int groups = Kappa<KERNEL>::norm ? s.groups : 1, count = s.rank / groups;
  for (int p = 0; p < groups; ++p) {
    float sum[TALL][WIDE] = {};
    for (int first = 0; first < count; first += DEPTH) {
      const int depth = count - first < DEPTH ? count - first : DEPTH;
      const float* from = layer.factors + (p * count + first) * s.stride;
      __syncthreads();  // the stage has been read
      load(stage.a, from + tile.column, s.stride, depth, tile.columns);
      load(stage.b, from + s.n + tile.row, s.stride, depth, tile.rows);
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < depth; ++k) {
        float b[TALL], a[WIDE];
#pragma unroll
        for (int r = 0; r < TALL; ++r) b[r] = stage.b[k][row_of(r)];
#pragma unroll
        for (int c = 0; c < WIDE; ++c) a[c] = stage.a[k][column_of(c)];
#pragma unroll
        for (int r = 0; r < TALL; ++r)
#pragma unroll
          for (int c = 0; c < WIDE; ++c) sum[r][c] = Kappa<KERNEL>::accumulate(b[r], a[c], sum[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < TALL; ++r)
#pragma unroll
      for (int c = 0; c < WIDE; ++c)
        K[r][c] = Kappa<KERNEL>::add_group(sum[r][c], layer.theta, p, p ? K[r][c] : 0.0f);
  }
  if (KERNEL == MIXTURE) {
#pragma unroll
    for (int c = 0; c < WIDE; ++c) {
      const float maximum = column_of(c) < tile.columns ? s.smooth_max[tile.column + column_of(c)] : 0.0f;
#pragma unroll
      for (int r = 0; r < TALL; ++r) K[r][c] = Kappa<KERNEL>::finish(K[r][c], layer.theta + s.groups, maximum);
    }
  }
}

// Calls `take` with those of this thread's entries of the tile that lie inside the matrix.
template <class Take>
__device__ __forceinline__ void each(const float (&K)[TALL][WIDE], const Tile& tile, Take take) {
  const bool whole = tile.rows == ROWS && tile.columns == COLUMNS;
#pragma unroll
  for (int r = 0; r < TALL; ++r)
#pragma unroll
    for (int c = 0; c < WIDE; ++c)
      if (whole || (row_of(r) < tile.rows && column_of(c) < tile.columns)) take(K[r][c]);
}

// Counts the keys of every `step`-th tile into the layer's state and buckets.
template <int KERNEL>
__device__ void count(const SnellSelect& s, const Layer& layer, Shared& shared, int start, int step) {
  const int lo = int(fresh(layer.state + LO)), hi = int(fresh(layer.state + HI));
  const int shift = int(fresh(layer.state + SHIFT));
  const unsigned width = unsigned(hi - lo);
  const int across = blocks_of(s.n, COLUMNS), tiles = blocks_of(s.m, ROWS) * across;
  Counts counts;
  for (int number = start; number < tiles; number += step) {
    const Tile tile(s, number, across);
    float K[TALL][WIDE];
    kappa_tile<KERNEL>(s, layer, shared.stage, tile, K);
    if (threadIdx.x == 0) shared.used = 0;
    __syncthreads();
    // Few keys lie inside: they are listed first, so that no warp waits for those of its threads that have one.
    int inside = 0;
    each(K, tile, [&](float value) {
      const unsigned above = unsigned(key_of(value) - lo);
      counts.below += above >> 31;
      inside += above <= width;
    });
    int slot = atomicAdd(&shared.used, inside);
    each(K, tile, [&](float value) {
      const unsigned above = unsigned(key_of(value) - lo);
      if (above <= width) shared.inside[slot++] = above;
    });
    __syncthreads();
    for (int j = threadIdx.x; j < shared.used; j += THREADS) {
      const unsigned above = shared.inside[j];
      if (above == 0) {  // the ends are counted apart: many equal keys would queue for one bin
        ++counts.at_lo;
      } else if (above == width) {
        ++counts.at_hi;
      } else {
        const unsigned bin = (above - 1) >> shift;
        const int64_t place = add(layer.state + HEAD + bin, 1);
        if (place < s.bucket) layer.buckets[int64_t(bin) * s.bucket + place] = lo + int(above);
      }
    }
  }
  const unsigned totals[] = {warp_sum(counts.below), warp_sum(counts.at_lo), warp_sum(counts.at_hi)};
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < 3; ++i) add(layer.state + BELOW + i, totals[i]);
}

// The k-th smallest of the keys that a bucket keeps.
__device__ int kth_of_bucket(const int* bucket, int number, int64_t k, Decision& shared) {
  for (int j = threadIdx.x; j < number; j += THREADS) shared.keys[j] = fresh(bucket + j);
  __syncthreads();
  for (int j = threadIdx.x; j < number; j += THREADS) {
    int less = 0, equal = 0;
    for (int i = 0; i < number; ++i) {
      less += shared.keys[i] < shared.keys[j];
      equal += shared.keys[i] == shared.keys[j];
    }
    if (less < k && k <= less + equal) shared.answer = shared.keys[j];
  }
  __syncthreads();
  return shared.answer;
}

// What a pass's counts say: tau, or another bracket. Everything is read before anything is written.
__device__ void choose(const SnellSelect& s, const Layer& layer, Decision& shared) {
  int64_t* state = layer.state;
  const int64_t lo = fresh(state + LO), hi = fresh(state + HI), shift = fresh(state + SHIFT);
  const int64_t below = fresh(state + BELOW), at_lo = fresh(state + AT_LO), at_hi = fresh(state + AT_HI);
  const int64_t misses = fresh(state + MISSES), start = below + at_lo;
  const Place place = find([=](int i) { return fresh(state + HEAD + i); }, s.bins, s.k - start, shared.search);
  const int64_t stop = start + place.total;
  // A bracket that missed grows by four times its width; where that misses too, by all there is.
  const int64_t reach = misses ? int64_t(LARGEST) : 4 * (hi - lo) + s.bins;
  int64_t key = -1, missed = 1, new_lo = hi + 1, new_hi = hi + reach < LARGEST ? hi + reach : int64_t(LARGEST);
  if (s.k <= below) {
    new_lo = lo > reach ? lo - reach : 0;
    new_hi = lo - 1;
  } else if (s.k <= start) {
    key = lo;
  } else if (s.k <= stop) {
    missed = 0;
    const int64_t number = fresh(state + HEAD + place.bin), end = lo + 1 + ((place.bin + 1) << shift);
    new_lo = lo + 1 + (place.bin << shift);
    new_hi = (end < hi ? end : hi) - 1;
    if (shift == 0)
      key = new_lo;
    else if (number <= s.bucket)
      key = kth_of_bucket(layer.buckets + place.bin * s.bucket, int(number), s.k - start - place.before, shared);
  } else if (s.k <= stop + at_hi) {
    key = hi;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (key >= 0)
      settle(s, layer, key);
    else
      set_bracket(state, new_lo, new_hi, s.bins);
    // For the next pass, which may be this block's own.
    state[MISSES] = misses + missed;
    state[BELOW] = state[AT_LO] = state[AT_HI] = state[ARRIVED] = 0;
  }
  for (int bin = threadIdx.x; bin < s.bins; bin += THREADS) state[HEAD + bin] = 0;
  __syncthreads();
}

// One pass over K; a block owns every gridDim.x-th tile. The last to arrive decides, and goes on alone if it `goes_on`.
template <int KERNEL>
__global__ void __launch_bounds__(THREADS, 2) count_kernel(SnellSelect s, bool goes_on) {
  SNELL_SHARED(Shared, shared);
  const Layer layer(s);
  int start = blockIdx.x, step = gridDim.x;
  while (fresh(layer.state + SHIFT) >= 0) {
    count<KERNEL>(s, layer, shared, start, step);
    if (!is_last(layer.state, step, shared.arrived)) return;
    choose(s, layer, shared.decision);
    if (!goes_on) return;
    start = 0;
    step = 1;
  }
}

template <int KERNEL>
cudaError_t select(const SnellSelect& s, cudaStream_t stream) {
  const int hashing = blocks_of(s.m + s.n, SAMPLERS) * blocks_of(s.rank, HASHED);
  const int sampling = blocks_of(s.samples, SAMPLERS);
  const int tiles = blocks_of(s.m, ROWS) * blocks_of(s.n, COLUMNS);
  const unsigned layers = s.layers, counting = unsigned(tiles < s.programs ? tiles : s.programs);
  const dim3 bracketing{unsigned(hashing > sampling ? hashing : sampling), layers};
  cudaError_t status = launch(bracket_kernel<KERNEL>, bracketing, SAMPLERS, stream, s);
  for (int pass = 0; pass < s.passes && status == cudaSuccess; ++pass)
    status = launch(count_kernel<KERNEL>, dim3{counting, layers}, THREADS, stream, s, pass == s.passes - 1);
  return status;
}

}  // namespace
}  // namespace snell

#define SNELL_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or an error that snell_cuda_error names.
SNELL_EXPORT int snell_cuda_select(const SnellSelect* s, void* stream) {
  using namespace snell;
  using Launcher = cudaError_t (*)(const SnellSelect&, cudaStream_t);
  const Launcher launchers[] = {select<PIECEWISE_LINEAR>, select<LINEAR>, select<SIGMOID>, select<RBF>,
                                select<MIXTURE>};
  return int(launchers[s->kernel](*s, static_cast<cudaStream_t>(stream)));
}

SNELL_EXPORT const char* snell_cuda_error(int status) { return cudaGetErrorString(cudaError_t(status)); }
