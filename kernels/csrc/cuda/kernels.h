// prune_tokens in three launches: project, score, select and copy. The algebra is that of dvit_kernels/score_tokens.py:
// LayerNorm as a rank-1 correction behind the first product, LN(x) W^T = rstd * (x W^T - mean * rowsum(W)); of the
// averaged half only column sums; the third layer's weighted sum as the score.
#pragma once

#include "../select.h"
#include "plan.h"
#include "tile.h"

namespace dvit {
inline namespace DVIT_LEVEL {

// Mean and squares of deviations of a growing number of values (Chan et al. 1983): stable in one pass.
struct Moments {
  float count, mean, squares;

  DVIT_DEVICE void add(float more, float their_mean, float their_squares) {
    const float all = count + more, delta = their_mean - mean;
    mean += delta * (more / all);
    squares += their_squares + delta * delta * (count * (more / all));
    count = all;
  }
};

// Half a row of a stage for each thread: the row is threadIdx.x / 2.
template <class T>
DVIT_DEVICE void add_half_row(Moments &moments, const Stage<T> &stage) {
  constexpr int many = kDepth / 2;
  const T *values = &stage.a[threadIdx.x / 2][threadIdx.x % 2 * many];
  float mean = 0, squares = 0;
  for (int i = 0; i < many; ++i) mean += to_float(values[i]);
  mean /= many;
  for (int i = 0; i < many; ++i) {
    const float deviation = to_float(values[i]) - mean;
    squares += deviation * deviation;
  }
  moments.add(many, mean, squares);
}

// gelu(LN(x) w1^T + b1) of a tile of rows, which are the patch tokens of all pictures one after the other: the own half
// of every token, and of the averaged half the sums by (tile, picture in it).
template <class T>
DVIT_KERNEL __launch_bounds__(kThreads, kBlocksAtOnce) project(Plan<T> plan) {
  DVIT_SHARED TileMemory<T> memory;
  DVIT_SHARED Moments halves[kThreads];
  DVIT_SHARED float means[kTile], scales[kTile];
  const int column_tiles = ceil_div(plan.channels, kTile), half = plan.channels / 2, thread = threadIdx.x;
  const int64_t tile = blockIdx.x / column_tiles, first_row = tile * kTile;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * kTile;
  if (thread < kTile) {
    const int64_t row = first_row + thread, image = row / plan.tokens, token = plan.prefix + row % plan.tokens;
    memory.a_rows[thread] = row < plan.rows ? plan.x + image * plan.batch_stride + token * plan.token_stride : nullptr;
    const int column = first_column + thread;
    memory.w_rows[thread] = column < plan.channels ? plan.w1 + int64_t{column} * plan.channels : nullptr;
  }
  __syncthreads();
  Moments moments = {};
  multiply<T>(memory, plan.channels, plan.x_aligned, plan.weights_aligned,
              [&](const Stage<T> &stage) { add_half_row<T>(moments, stage); });
  halves[thread] = moments;
  __syncthreads();
  if (thread < kTile) {
    Moments row = halves[2 * thread];
    const Moments &other = halves[2 * thread + 1];
    row.add(other.count, other.mean, other.squares);
    means[thread] = row.mean;
    scales[thread] = 1.0f / sqrtf(row.squares / static_cast<float>(plan.channels) + plan.eps);
  }
  __syncthreads();

  const int local = thread % kTile, column = first_column + local;
  if (column < plan.channels) {
    const float w1_sum = plan.w1_sum[column], b1 = plan.b1[column];
    for (int r = thread / kTile; r < kTile; r += kThreads / kTile) {
      const float y = gelu(scales[r] * (memory.sums[r][local] - means[r] * w1_sum) + b1);
      memory.sums[r][local] = y;
      if (column < half && first_row + r < plan.rows) plan.hidden[(first_row + r) * half + column] = from_float<T>(y);
    }
  }
  __syncthreads();
  if (thread < kTile && column >= half && column < plan.channels) {
    float *to = plan.sums + tile * plan.segments * half + (column - half);
    float total = 0;
    int left = plan.tokens - static_cast<int>(first_row % plan.tokens);  // of the picture that the row is in
    const int rows = static_cast<int>(smaller<int64_t>(kTile, plan.rows - first_row));
    for (int r = 0; r < rows; ++r) {
      total += memory.sums[r][local];
      if (--left == 0 || r == rows - 1) {
        *to = total;
        to += half;
        total = 0;
        left = plan.tokens;
      }
    }
  }
}

// The averaged half's part of the second layer for one picture, w2_mean mean + b2, to `shared`. Eight threads share a
// row of w2_mean; `partial` and `mean` are their scratch.
template <class T>
DVIT_DEVICE void share(const Plan<T> &plan, int64_t image, float *mean, float (*partial)[kMostHalf], float *shared) {
  constexpr int many = 16 / sizeof(T), sharers = 8;
  const int half = plan.channels / 2, thread = threadIdx.x;
  const int64_t first_tile = image * plan.tokens / kTile, last_tile = ((image + 1) * plan.tokens - 1) / kTile;
  for (int i = thread; i < half; i += kThreads) {
    float total = 0;
    for (int64_t tile = first_tile; tile <= last_tile; ++tile) {
      const int64_t segment = tile * plan.segments + image - tile * kTile / plan.tokens;
      total += plan.sums[segment * half + i];
    }
    mean[i] = total / static_cast<float>(plan.tokens);
  }
  __syncthreads();
  for (int row = thread / sharers; row < half; row += kThreads / sharers) {
    const T *w = plan.w2_mean + int64_t{row} * half;
    float total = 0;
    for (int k = thread % sharers * many; k < half; k += sharers * many) {
      Vector<T> some;
      if (plan.weights_aligned)
        some = *reinterpret_cast<const Vector<T> *>(w + k);
      else
        for (int i = 0; i < many; ++i) some.values[i] = w[k + i];
      for (int i = 0; i < many; ++i) total += to_float(some.values[i]) * mean[k + i];
    }
    partial[thread % sharers][row] = total;
  }
  __syncthreads();
  for (int i = thread; i < half; i += kThreads) {
    float total = plan.b2[i];
    for (int s = 0; s < sharers; ++s) total += partial[s][i];
    shared[i] = total;
  }
  __syncthreads();
}

// The scores of a tile of one picture's tokens. What the second layer gives goes through plan.second, in rows that no
// other block touches.
template <class T>
DVIT_KERNEL __launch_bounds__(kThreads, kBlocksAtOnce) score(Plan<T> plan) {
  DVIT_SHARED TileMemory<T> memory;
  DVIT_SHARED float mean[kMostHalf], shared[kMostHalf], halves[kThreads];
  const int half = plan.channels / 2, quarter = plan.channels / 4, thread = threadIdx.x;
  const int tiles = ceil_div(plan.tokens, kTile), local = thread % kTile;
  const int64_t image = blockIdx.x / tiles;
  const int first_token = static_cast<int>(blockIdx.x % tiles) * kTile;
  const int rows = smaller(kTile, plan.tokens - first_token);
  const int64_t first_row = image * plan.tokens + first_token;

  static_assert(sizeof(memory.stages) >= sizeof(float[8][kMostHalf]), "");
  share<T>(plan, image, mean, reinterpret_cast<float (*)[kMostHalf]>(memory.stages), shared);
  for (int first = 0; first < half; first += kTile) {
    if (thread < kTile) {
      memory.a_rows[thread] = thread < rows ? plan.hidden + (first_row + thread) * half : nullptr;
      memory.w_rows[thread] = first + thread < half ? plan.w2_own + int64_t{first + thread} * half : nullptr;
    }
    __syncthreads();
    multiply<T>(memory, half, true, plan.weights_aligned, [](const Stage<T> &) {});
    const int column = first + local;
    for (int r = thread / kTile; r < rows && column < half; r += kThreads / kTile)
      plan.second[(first_row + r) * half + column] = from_float<T>(gelu(memory.sums[r][local] + shared[column]));
    __syncthreads();
  }
  float total = 0;  // of half the columns of row thread / 2
  for (int first = 0; first < quarter; first += kTile) {
    if (thread < kTile) {
      memory.a_rows[thread] = thread < rows ? plan.second + (first_row + thread) * half : nullptr;
      memory.w_rows[thread] = first + thread < quarter ? plan.w3 + int64_t{first + thread} * half : nullptr;
    }
    __syncthreads();
    multiply<T>(memory, half, true, plan.weights_aligned, [](const Stage<T> &) {});
    for (int j = thread % 2; j < kTile && first + j < quarter; j += 2)
      total += gelu(memory.sums[thread / 2][j] + plan.b3[first + j]) * plan.w4[first + j];
    __syncthreads();
  }
  halves[thread] = total;
  __syncthreads();
  if (thread < rows) plan.score[first_row + thread] = halves[2 * thread] + halves[2 * thread + 1] + plan.b4[0];
}

// Chooses a picture's tokens and copies some of the rows that stay, in units as large as everything is aligned to.
// Every block of a picture chooses anew.
template <class Unit>
DVIT_KERNEL __launch_bounds__(kSelectThreads) select(SelectPlan plan) {
  using Group = Block<kSelectThreads>;
  DVIT_SHARED uint32_t keys[kMostTokens];
  DVIT_SHARED uint16_t kept[kMostTokens];
  DVIT_SHARED int totals[Group::warps];
  const int thread = threadIdx.x;
  const int64_t image = blockIdx.x / plan.blocks_per_image, rows = plan.prefix + plan.keep;
  const float *score = plan.score + image * plan.tokens;
  for (int i = thread; i < plan.tokens; i += kSelectThreads) keys[i] = order_key(score[i]);
  __syncthreads();
  Group group{thread, totals};
  select_tokens(group, [](int i) { return keys[i]; }, plan.tokens, plan.keep, kept);
  __syncthreads();

  const int64_t units = plan.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t block = blockIdx.x % plan.blocks_per_image;
  for (int64_t row = block * Group::warps + thread / 32; row < rows; row += plan.blocks_per_image * Group::warps) {
    const int64_t position = row < plan.prefix ? 0 : kept[row - plan.prefix];
    const int64_t source = row < plan.prefix ? row : plan.prefix + position;
    const char *from = plan.x + image * plan.batch_stride + source * plan.token_stride;
    char *to = plan.kept_x + (image * rows + row) * plan.row_bytes;
    for (int64_t i = thread % 32; i < units; i += 32)
      reinterpret_cast<Unit *>(to)[i] = reinterpret_cast<const Unit *>(from)[i];
    if (row >= plan.prefix && thread % 32 == 0) plan.index[image * plan.keep + row - plan.prefix] = position;
  }
}

}  // namespace DVIT_LEVEL
}  // namespace dvit
