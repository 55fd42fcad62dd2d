// A layer's state, and the first launch of select: the factors' hash, a sample, and the bracket that it gives.
#pragma once
#include "api.h"
#include "kappa.cuh"

namespace snell {

// The head of a layer's state, before its bins: as kernels/select.py has it.
enum { LO, HI, SHIFT, BELOW, AT_LO, AT_HI, HASH, ARRIVED, MISSES, HEAD = 16 };

constexpr int SAMPLERS = 1024, HASHED = 8;  // threads of a block of bracket_kernel, and rank columns that it hashes
constexpr int DIGITS = 2048;                // of the sample's keys, at most

// A number that other blocks wrote: not from this multiprocessor's own cache.
template <class T>
__device__ __forceinline__ T fresh(const T* address) {
  return __ldcg(address);
}
__device__ __forceinline__ int64_t fresh(const int64_t* address) {
  return __ldcg(reinterpret_cast<const long long*>(address));
}

__device__ __forceinline__ int64_t add(int64_t* address, uint64_t value) {
  return int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value)));
}

__host__ __device__ constexpr int blocks_of(int64_t number, int size) { return int((number + size - 1) / size); }

// This block's layer.
struct Layer {
  const float *factors, *theta;
  int64_t* state;
  int32_t *sample, *buckets;
  float* tau;

  __device__ explicit Layer(const SnellSelect& s) {
    const int64_t layer = blockIdx.y;
    factors = s.factors + layer * (s.m + s.n);
    theta = s.theta + layer * s.num_theta;
    state = s.state + layer * (HEAD + s.bins);
    sample = s.sample + layer * s.room;
    buckets = s.buckets + layer * s.bins * s.bucket;
    tau = s.tau + layer;
  }
};

// Whether all `blocks` have arrived, this one last; what they wrote before is then visible.
__device__ inline bool is_last(int64_t* state, int64_t blocks, int64_t& arrived) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) arrived = add(state + ARRIVED, 1);
  __syncthreads();
  __threadfence();
  return arrived == blocks - 1;
}

// Which counter holds the k-th of all that are counted, how many are counted before it, and in all.
struct Place {
  int64_t bin, before, total;
};
struct Search {
  int64_t sums[SAMPLERS];
  Place place;
};

// For the whole block, whose threads take equal runs of the counters. The bin is 0 if k is not among the counted.
template <class Counter>
__device__ Place find(Counter counter, int number, int64_t k, Search& shared) {
  const int run = number / int(blockDim.x), t = threadIdx.x;
  int64_t mine = 0;
  for (int i = t * run; i < (t + 1) * run; ++i) mine += counter(i);
  shared.sums[t] = mine;
  if (t == 0) shared.place = {0, 0, 0};
  __syncthreads();
  for (int offset = 1; offset < int(blockDim.x); offset *= 2) {
    const int64_t left = t >= offset ? shared.sums[t - offset] : 0;
    __syncthreads();
    shared.sums[t] += left;
    __syncthreads();
  }
  int64_t before = shared.sums[t] - mine;
  if (before < k && k <= shared.sums[t]) {
    int i = t * run;
    for (; before + counter(i) < k; ++i) before += counter(i);
    shared.place.bin = i;
    shared.place.before = before;
  }
  __syncthreads();
  return {shared.place.bin, shared.place.before, shared.sums[blockDim.x - 1]};
}

// A new bracket, with the least shift whose bins cover the keys strictly inside it.
__device__ inline void set_bracket(int64_t* state, int64_t lo, int64_t hi, int bins) {
  int shift = 0;
  while ((hi - lo - 2) >> shift >= bins) ++shift;
  state[LO] = lo;
  state[HI] = hi;
  state[SHIFT] = shift;
}

// Never 0: that is a fresh memo's.
__device__ inline uint64_t fingerprint(const SnellSelect& s, const int64_t* state) {
  return (uint64_t(fresh(state + HASH)) + uint64_t(s.salt)) | 1;
}

// tau is known: hand it out and remember it with the fingerprint it belongs to.
__device__ inline void settle(const SnellSelect& s, const Layer& layer, int64_t key) {
  *layer.tau = __int_as_float(int(key));
  layer.state[SHIFT] = -1;
  if (s.memo) {
    const uint64_t of_factors = fingerprint(s, layer.state);
    s.memo[0] = int64_t(of_factors);
    s.memo[1] = int64_t(of_factors << 32 | uint64_t(key));
  }
}

// splitmix64's finaliser.
__device__ inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// As kernels/fingerprint.py, which checks it.
__device__ inline uint64_t hash_number(float x, int64_t position) {
  return mix(uint64_t(position) << 32 ^ uint32_t(__float_as_int(x)));
}

// This block's share of the hash: HASHED rank columns of a row a thread, and theta.
__device__ inline uint64_t hash_share(const SnellSelect& s, const Layer& layer) {
  const int across = blocks_of(s.m + s.n, SAMPLERS), first = int(blockIdx.x) / across * HASHED;
  const int64_t i = int64_t(int(blockIdx.x) % across) * SAMPLERS + threadIdx.x;
  uint64_t hash = 0;
  if (i < s.m + s.n)
    for (int k = first; k < first + HASHED && k < s.rank; ++k)
      hash += hash_number(layer.factors[k * s.stride + i], i * s.rank + k);
  const int t = threadIdx.x;
  if (blockIdx.x == 0 && t < s.num_theta) hash += hash_number(layer.theta[t], -1 - t);
  return hash;
}

// A random number below `bound`, which is less than 2^32.
__device__ inline int64_t draw(uint64_t counter, int64_t bound) {
  return int64_t((mix(counter * 0x9E3779B97F4A7C15) >> 32) * uint64_t(bound) >> 32);
}

// |K|'s key of the entry (row, column), one at a time.
template <int KERNEL>
__device__ int key_of_entry(const SnellSelect& s, const Layer& layer, int64_t row, int64_t column) {
  const int groups = Kappa<KERNEL>::norm ? s.groups : 1, count = s.rank / groups;
  const float *a = layer.factors + column, *b = layer.factors + s.n + row;
  float K = 0.0f;
  for (int p = 0; p < groups; ++p) {
    float sum = 0.0f;
    for (int k = p * count; k < (p + 1) * count; ++k)
      sum = Kappa<KERNEL>::accumulate(b[k * s.stride], a[k * s.stride], sum);
    K = Kappa<KERNEL>::add_group(sum, layer.theta, p, K);
  }
  if (KERNEL == MIXTURE) K = Kappa<KERNEL>::finish(K, layer.theta + s.groups, s.smooth_max[column]);
  return key_of(K);
}

struct Bracketing {
  Search search;
  int digits[DIGITS];
  int64_t arrived;
  bool known;
};

// The k-th smallest of the sample, 11, 10 and 10 bits at a time.
__device__ inline int kth_of_sample(const int* sample, int number, int64_t k, Bracketing& shared) {
  int prefix = 0;
  for (int above = 31; above;) {
    const int width = above == 31 ? 11 : 10, shift = above - width, t = threadIdx.x;
    for (int i = t; i < DIGITS; i += SAMPLERS) shared.digits[i] = 0;
    __syncthreads();
    for (int j = t; j < number; j += SAMPLERS) {
      const int key = fresh(sample + j);
      if (int64_t(key) >> above == prefix) atomicAdd(&shared.digits[key >> shift & ((1 << width) - 1)], 1);
    }
    __syncthreads();
    const Place place = find([&](int i) { return int64_t(shared.digits[i]); }, 1 << width, k, shared.search);
    prefix = prefix << width | int(place.bin);
    k -= place.before;
    above = shift;
  }
  return prefix;
}

// tau where it is known, else the first bracket. A block draws an entry a thread and hashes a part of the factors.
template <int KERNEL>
__global__ void __launch_bounds__(SAMPLERS, 1) bracket_kernel(SnellSelect s) {
  SNELL_SHARED(Bracketing, shared);
  const Layer layer(s);
  const uint64_t hash = warp_sum(hash_share(s, layer));
  if (threadIdx.x % 32 == 0 && hash) add(layer.state + HASH, hash);
  const int64_t i = int64_t(blockIdx.x) * SAMPLERS + threadIdx.x;
  if (i < s.samples) {
    layer.sample[i] = key_of_entry<KERNEL>(s, layer, draw(2 * i + 1, s.m), draw(2 * i + 2, s.n));
  }
  if (!is_last(layer.state, gridDim.x, shared.arrived)) return;
  // One thread asks: another stream may select for this layer and write to the memo meanwhile. The second half of the
  // fingerprint tells a tau that does not belong to the first.
  if (threadIdx.x == 0) {
    shared.known = false;
    if (s.memo) {
      const uint64_t found = fingerprint(s, layer.state), held = uint64_t(fresh(s.memo + 1));
      shared.known = found == uint64_t(fresh(s.memo)) && uint32_t(found) == uint32_t(held >> 32);
      if (shared.known) {
        *layer.tau = __int_as_float(int(uint32_t(held)));
        layer.state[SHIFT] = -1;
      }
    }
    layer.state[ARRIVED] = 0;
  }
  __syncthreads();
  if (shared.known) return;
  const int lo = s.low < 1 ? 0 : kth_of_sample(layer.sample, s.samples, s.low, shared);
  const int hi = s.high > s.samples ? LARGEST : kth_of_sample(layer.sample, s.samples, s.high, shared);
  if (threadIdx.x == 0) set_bracket(layer.state, lo, hi, s.bins);
}

}  // namespace snell
