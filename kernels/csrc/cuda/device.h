// What kernels take from CUDA. Compiled by another compiler they take it from tests/emulation.h, where the threads of a
// block are threads of the host: that is how the kernels are tested where there is no GPU.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#include <cuda_pipeline.h>
#define DVIT_KERNEL __global__ void
#define DVIT_DEVICE __device__ inline
#define DVIT_SHARED __shared__
#else
#include "emulation.h"
#endif

namespace dvit {
inline namespace DVIT_LEVEL {

// 16 bytes, loaded and stored at once.
template <class T>
struct alignas(16) Vector {
  T values[16 / sizeof(T)];
};

// A block of threads as the group that select_tokens takes.
template <int Threads>
struct Block {
  static constexpr int size = Threads, warps = Threads / 32;
  const int rank;
  int *totals;  // shared, one for each warp

  DVIT_DEVICE int count(bool flag) { return __syncthreads_count(flag); }

  DVIT_DEVICE int count_before(bool flag, int &total) {
    const uint32_t flags = __ballot_sync(0xffffffffu, flag);
    if (rank % 32 == 0) totals[rank / 32] = __popc(flags);
    __syncthreads();
    int before = __popc(flags & ((1u << rank % 32) - 1));
    total = 0;
    for (int warp = 0; warp < warps; ++warp) {
      before += warp < rank / 32 ? totals[warp] : 0;
      total += totals[warp];
    }
    __syncthreads();  // before anyone writes its total of the next count
    return before;
  }
};

// GELU in its exact form.
DVIT_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

}  // namespace DVIT_LEVEL
}  // namespace dvit
