// Kernels with known faults and without, for the tests of csrc/cuda/emulate.h.
#include "device.cuh"

namespace {

constexpr int THREADS = 128;

struct Shared {
  int values[THREADS];
};

// out[t] = t's left neighbour, through shared memory; without the barrier it depends on which thread comes first.
__global__ void rotate(int* out, bool barrier) {
  SNELL_SHARED(Shared, shared);
  const int t = threadIdx.x;
  shared.values[t] = t;
  if (barrier) __syncthreads();
  out[blockIdx.x * THREADS + t] = shared.values[(t + THREADS - 1) % THREADS];
}

// Some threads leave before a barrier that the others wait at.
__global__ void diverge(int* out, int leaving) {
  if (int(threadIdx.x) < leaving) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void sum_warps(int* out) { out[threadIdx.x] = snell::warp_sum(int(threadIdx.x)); }

__global__ void count_blocks(int* out) { atomicAdd(out, int(blockIdx.x + 10 * blockIdx.y)); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT run_rotate(int* out, bool barrier) {
  return snell::launch(rotate, dim3{3}, THREADS, nullptr, out, barrier);
}
EXPORT run_diverge(int* out, int leaving) { return snell::launch(diverge, dim3{1}, THREADS, nullptr, out, leaving); }
EXPORT run_sum_warps(int* out) { return snell::launch(sum_warps, dim3{1}, THREADS, nullptr, out); }
EXPORT run_count_blocks(int* out) { return snell::launch(count_blocks, dim3{4, 2}, THREADS, nullptr, out); }
