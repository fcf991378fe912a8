// What kernels take from CUDA, on the host: the threads of a block are threads of this process, the blocks of a grid
// run one after the other. Races inside a block are real ones, for ThreadSanitizer to see.
#pragma once

#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "../team.h"
#include "common.h"

#define DVIT_KERNEL static void
#define DVIT_DEVICE inline
#define DVIT_SHARED static
#define __launch_bounds__(...)

namespace emulation {

struct Index {
  unsigned x;
};

struct Block {
  explicit Block(int size) : barrier(size), flags(size) {}
  dvit::Barrier barrier;
  std::vector<int> flags;
  std::atomic<int> counts[3] = {};  // one is added to, one read, one cleared
};

inline thread_local Block *block;
inline thread_local unsigned counted;

}  // namespace emulation

inline thread_local emulation::Index threadIdx, blockIdx;

inline void __syncthreads() { emulation::block->barrier.wait(); }

inline int __syncthreads_count(bool flag) {
  const unsigned turn = emulation::counted++;
  auto &counts = emulation::block->counts;
  counts[turn % 3] += flag;
  __syncthreads();
  if (threadIdx.x == 0) counts[(turn + 2) % 3] = 0;
  return counts[turn % 3];
}

// All warps of the block at once, which is enough for code that all of them run.
inline uint32_t __ballot_sync(uint32_t, bool flag) {
  emulation::block->flags[threadIdx.x] = flag;
  __syncthreads();
  uint32_t all = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    all |= static_cast<uint32_t>(emulation::block->flags[threadIdx.x / 32 * 32 + lane]) << lane;
  __syncthreads();
  return all;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes) {
  memcpy(__builtin_assume_aligned(to, 16), __builtin_assume_aligned(from, 16), bytes);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {}

namespace emulation {

template <class Kernel, class Plan>
void launch(Kernel kernel, int64_t blocks, int threads, const Plan &plan) {
  Block shared(threads);
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread)
    all.emplace_back([&, thread] {
      block = &shared;
      threadIdx.x = static_cast<unsigned>(thread);
      for (int64_t i = 0; i < blocks; ++i) {
        blockIdx.x = static_cast<unsigned>(i);
        kernel(plan);
        __syncthreads();  // shared memory is the next block's then
      }
    });
  for (std::thread &thread : all) thread.join();
}

}  // namespace emulation
