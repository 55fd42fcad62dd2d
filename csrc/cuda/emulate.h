// CUDA's language on a CPU, as far as the kernels here use it: a C++ compiler makes a library of the same sources, which
// tests run. Blocks run one after another. A thread is a fiber that runs up to its next barrier or warp exchange. Blocks
// and threads take turns in a random order, so that a missing barrier gives wrong results. Shared memory starts as
// garbage. A barrier that some threads of a block never reach ends the launch with an error.
//
// It does not show stale caches, a missing fence, blocks that run at the same time, divergence inside a warp, or time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr int WARP = 32, STACK = 1 << 16, SHARED = 48 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  const unsigned* awaited;  // runs on when this is no longer `seen`
  unsigned seen;
  bool done;
};

// All fibers of a block, or of a warp, meet here; `generation` counts how often they have.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp : Meeting {
  uint64_t values[2][WARP];
};

inline std::mutex running;
inline std::mt19937 order;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Meeting block;
inline std::function<void()> body;
inline ucontext_t scheduler;
alignas(16) inline char shared[SHARED];
// An exponential that the caller may replace, where it compares bits with another implementation's.
inline float (*exponential)(float) = std::exp;

inline void meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  Fiber& fiber = fibers[threadIdx.x];
  fiber.awaited = &meeting.generation;
  fiber.seen = meeting.generation;
  swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
  body();
  fibers[threadIdx.x].done = true;
}

// Runs a block; false if its threads wait for one another in vain.
inline bool run_block(int threads) {
  std::memset(shared, 0xA5, SHARED);
  block = {threads};
  warps.assign(threads / WARP, {});
  for (Warp& warp : warps) warp.size = WARP;
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  std::shuffle(turns.begin(), turns.end(), order);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
    fiber.context.uc_link = &scheduler;
    fiber.awaited = nullptr;
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left;) {
    bool moved = false;
    for (int t : turns) {
      Fiber& fiber = fibers[t];
      if (fiber.done || (fiber.awaited && *fiber.awaited == fiber.seen)) continue;
      threadIdx = {unsigned(t)};
      fiber.awaited = nullptr;
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
      moved = true;
    }
    if (!moved) return false;
  }
  return true;
}

inline bool run_grid(dim3 grid, int threads) {
  std::lock_guard<std::mutex> guard(running);
  if (fibers.size() < size_t(threads)) fibers = std::vector<Fiber>(threads);
  blockDim = {unsigned(threads)};
  gridDim = grid;
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), order);
  return std::all_of(blocks.begin(), blocks.end(), [&](unsigned b) {
    blockIdx = {b % grid.x, b / grid.x};
    return run_block(threads);
  });
}

}  // namespace emulate

inline void __syncthreads() { emulate::meet(emulate::block); }
inline void __threadfence() {}

// Every lane of the warp takes part. Values of one exchange outlive the next, in which all lanes have read them.
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulate::Warp& warp = emulate::warps[threadIdx.x / emulate::WARP];
  const int lane = threadIdx.x % emulate::WARP;
  uint64_t(&values)[emulate::WARP] = warp.values[warp.generation % 2];
  std::memcpy(&values[lane], &value, sizeof(T));
  emulate::meet(warp);
  std::memcpy(&value, &values[lane ^ lanes], sizeof(T));
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline const char* cudaGetErrorString(cudaError_t) { return "some threads of a block never reach a barrier"; }

// The seed of the random order, and the exponential.
extern "C" inline __attribute__((used)) void snell_emulate(unsigned seed, float (*exponential)(float)) {
  emulate::order.seed(seed);
  emulate::exponential = exponential;
}
