// A tile of a product, a (rows, depth) times w (columns, depth) transposed, by one block: loaded in two stages,
// multiplied in float32 by plain cores and in halves by tensor cores, left in shared memory for what follows.
#pragma once

#include "device.h"

#ifdef __CUDACC__
#include <mma.h>
#endif

namespace dvit {
inline namespace DVIT_LEVEL {

constexpr int kTile = 64;         // rows and columns of a tile
constexpr int kDepth = 32;        // of a stage
constexpr int kThreads = 128;     // of a block
constexpr int kBlocksAtOnce = 4;  // on a multiprocessor: leaves a thread 128 registers, with which nothing spills

template <class T>
struct Stage {
  static constexpr int kStride = kDepth + 16 / sizeof(T);  // 16 bytes more: rows begin in different banks
  T a[kTile][kStride], w[kTile][kStride];
};

// The shared memory of a product. `sums` takes the place of the stages when these are done with.
template <class T>
struct TileMemory {
  const T *a_rows[kTile], *w_rows[kTile];  // null: a row of zeros
  union alignas(128) {
    Stage<T> stages[2];
    float sums[kTile][kTile + 4];
  };
};

template <class T>
DVIT_DEVICE void load_rows(T (*to)[Stage<T>::kStride], const T *const *rows, int start, int depth, bool aligned) {
  constexpr int many = 16 / sizeof(T), vectors = kDepth / many;
  for (int i = threadIdx.x; i < kTile * vectors; i += kThreads) {
    const T *from = rows[i / vectors];
    const int column = i % vectors * many;
    T *there = &to[i / vectors][column];
    if (from == nullptr || start + column >= depth) {  // depth is a multiple of 16: a vector is inside or beyond
      *reinterpret_cast<Vector<T> *>(there) = Vector<T>{};
    } else if (aligned) {
      __pipeline_memcpy_async(there, from + start + column, 16);
    } else {
      for (int j = 0; j < many; ++j) there[j] = from[start + column + j];
    }
  }
}

// The sums of one thread: 4 rows, 16 apart, and 8 columns, 8 apart, so that a warp's reads are in different banks.
template <class T>
struct Sums {
  float sum[4][8];

  DVIT_DEVICE Sums() {
    for (auto &row : sum)
      for (float &value : row) value = 0;
  }

  DVIT_DEVICE void add(const Stage<T> &stage) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8;
    float part[4][8] = {};  // of this stage alone: rounding grows with what one sum takes up
    for (int k = 0; k < kDepth; ++k) {
      float a[4], w[8];
      for (int i = 0; i < 4; ++i) a[i] = to_float(stage.a[row + 16 * i][k]);
      for (int j = 0; j < 8; ++j) w[j] = to_float(stage.w[column + 8 * j][k]);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 8; ++j) part[i][j] += a[i] * w[j];
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 8; ++j) sum[i][j] += part[i][j];
  }

  DVIT_DEVICE void store(float (*to)[kTile + 4]) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 8; ++j) to[row + 16 * i][column + 8 * j] = sum[i][j];
  }
};

#ifdef __CUDACC__
// The sums of one warp, a quarter of the tile: 2 x 2 fragments.
template <class Half, class Element>
struct TensorCoreSums {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[2][2];

  DVIT_DEVICE TensorCoreSums() {
    for (auto &row : sum)
      for (auto &fragment : row) nvcuda::wmma::fill_fragment(fragment, 0.0f);
  }

  DVIT_DEVICE static int first_row() { return threadIdx.x / 64 * 32; }
  DVIT_DEVICE static int first_column() { return threadIdx.x / 32 % 2 * 32; }

  DVIT_DEVICE void add(const Stage<Element> &stage) {
    using namespace nvcuda::wmma;
    for (int k = 0; k < kDepth; k += 16) {
      fragment<matrix_a, 16, 16, 16, Half, row_major> a[2];
      fragment<matrix_b, 16, 16, 16, Half, col_major> w[2];
      for (int i = 0; i < 2; ++i) {
        const Element *a_tile = &stage.a[first_row() + 16 * i][k], *w_tile = &stage.w[first_column() + 16 * i][k];
        load_matrix_sync(a[i], reinterpret_cast<const Half *>(a_tile), Stage<Element>::kStride);
        load_matrix_sync(w[i], reinterpret_cast<const Half *>(w_tile), Stage<Element>::kStride);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) mma_sync(sum[i][j], a[i], w[j], sum[i][j]);
    }
  }

  DVIT_DEVICE void store(float (*to)[kTile + 4]) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        nvcuda::wmma::store_matrix_sync(&to[first_row() + 16 * i][first_column() + 16 * j], sum[i][j], kTile + 4,
                                        nvcuda::wmma::mem_row_major);
  }
};

template <>
struct Sums<Float16> : TensorCoreSums<__half, Float16> {};
template <>
struct Sums<BFloat16> : TensorCoreSums<__nv_bfloat16, BFloat16> {};
#endif

// memory.sums = a w^T, from memory.a_rows and memory.w_rows, which all threads must have been able to see written.
// each(stage) is called with every stage on its way. `depth` is a multiple of 16.
template <class T, class Each>
DVIT_DEVICE void multiply(TileMemory<T> &memory, int depth, bool a_aligned, bool w_aligned, const Each &each) {
  Sums<T> sums;
  const auto load = [&](int start) {
    Stage<T> &stage = memory.stages[start / kDepth % 2];
    load_rows<T>(stage.a, memory.a_rows, start, depth, a_aligned);
    load_rows<T>(stage.w, memory.w_rows, start, depth, w_aligned);
    __pipeline_commit();
  };
  load(0);
  for (int start = 0; start < depth; start += kDepth) {
    const bool more = start + kDepth < depth;
    if (more) load(start + kDepth);
    if (more)
      __pipeline_wait_prior(1);
    else
      __pipeline_wait_prior(0);
    __syncthreads();
    sums.add(memory.stages[start / kDepth % 2]);
    each(memory.stages[start / kDepth % 2]);
    __syncthreads();  // before the stage is filled anew, or the sums take its place
  }
  sums.store(memory.sums);
  __syncthreads();
}

}  // namespace DVIT_LEVEL
}  // namespace dvit
