// What kernels take from CUDA, on the host: the threads of a block are threads of this process, the blocks of a grid
// run one after the other. Races inside a block are real ones, for ThreadSanitizer to see.
#pragma once

#include <atomic>
#include <cmath>
#include <deque>
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
  explicit Block(int size) : barrier(size), flags(size) {
    for (int first = 0; first < size; first += 32) warps.emplace_back(std::min(32, size - first));
  }
  dvit::Barrier barrier;
  std::deque<dvit::Barrier> warps;
  std::vector<int> flags;
  std::atomic<int> counts[3] = {};  // one is added to, one read, one cleared
};

struct Copy {
  void *to;
  const void *from;
  size_t bytes;
};
using Copies = std::vector<Copy>;

inline thread_local Block *block;
inline thread_local unsigned counted;
inline thread_local std::deque<Copies> copies(1);  // that have not arrived, by group; the last is not committed

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

// For whole warps. Only the own one is waited for: it orders nothing between this thread and other warps.
inline uint32_t __ballot_sync(uint32_t, bool flag) {
  const unsigned warp = threadIdx.x / 32;
  emulation::block->flags[threadIdx.x] = flag;
  emulation::block->warps[warp].wait();
  uint32_t all = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    all |= static_cast<uint32_t>(emulation::block->flags[warp * 32 + lane]) << lane;
  emulation::block->warps[warp].wait();
  return all;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

// A copy arrives as late as it may, when it is waited for; until then NaN is there.
inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes) {
  memset(to, 0xff, bytes);
  emulation::copies.back().push_back({to, from, bytes});
}

inline void __pipeline_commit() { emulation::copies.emplace_back(); }

// Leaves the last `many` of the committed groups on their way.
inline void __pipeline_wait_prior(size_t many) {
  for (; emulation::copies.size() > many + 1; emulation::copies.pop_front())
    for (const emulation::Copy &copy : emulation::copies.front())
      memcpy(__builtin_assume_aligned(copy.to, 16), __builtin_assume_aligned(copy.from, 16), copy.bytes);
}

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
