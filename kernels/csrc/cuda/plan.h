// What the three launches are given, and where in the workspace they leave what the next one reads.
#pragma once

#include "../workspace.h"
#include "tile.h"

namespace dvit {
inline namespace DVIT_LEVEL {

constexpr int kMostTokens = 4096, kLeastChannels = 64, kMostChannels = 1024, kMostHalf = kMostChannels / 2;
constexpr int kSelectThreads = 256;

// Whether vectors of 16 bytes can be read at p and at every multiple of `stride` elements from it.
template <class T>
bool aligned16(const T *p, int64_t stride = 0) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride) * sizeof(T)) % 16 == 0;
}

// The stride between `count` pictures or rows: that of a single one is never taken and may be anything.
inline int64_t stride_of(int64_t stride, int64_t count) { return count > 1 ? stride : 0; }

template <class T>
struct Plan {
  const T *x;
  const T *w1, *w2_own, *w2_mean, *w3;
  const float *w1_sum, *b1, *b2, *b3, *w4, *b4;
  T *hidden, *second;  // (rows, C/2)
  float *sums;         // (tiles, segments, C/2)
  float *score;        // (rows)
  int64_t batch_stride, token_stride, prefix, rows, tiles;
  int tokens, channels, segments;
  float eps;
  bool x_aligned, weights_aligned;
  size_t bytes;

  Plan(const dvit_tokens &shape, const dvit_predictor &p, float eps, const void *x, void *memory)
      : x(static_cast<const T *>(x)), w1(static_cast<const T *>(p.w1)), w2_own(static_cast<const T *>(p.w2_own)),
        w2_mean(static_cast<const T *>(p.w2_mean)), w3(static_cast<const T *>(p.w3)), w1_sum(p.w1_sum), b1(p.b1),
        b2(p.b2), b3(p.b3), w4(p.w4), b4(p.b4), batch_stride(stride_of(shape.batch_stride, shape.batch)),
        token_stride(stride_of(shape.token_stride, shape.prefix + shape.tokens)), prefix(shape.prefix),
        rows(shape.batch * shape.tokens), tiles(ceil_div<int64_t>(rows, kTile)), tokens(static_cast<int>(shape.tokens)),
        channels(static_cast<int>(shape.channels)),
        segments(smaller(kTile, (kTile - 2) / tokens + 2)),  // pictures that a tile can touch
        eps(eps), x_aligned(aligned16(this->x, batch_stride) && aligned16(this->x, token_stride)),
        weights_aligned(aligned16(w1) && aligned16(w2_own) && aligned16(w2_mean) && aligned16(w3)) {
    Workspace workspace(memory);
    const int64_t half = channels / 2;
    hidden = workspace.take<T>(rows * half);
    second = workspace.take<T>(rows * half);
    sums = workspace.take<float>(tiles * segments * half);
    score = workspace.take<float>(rows);
    bytes = workspace.bytes();
  }

  int64_t project_blocks() const { return tiles * ceil_div(channels, kTile); }
  int64_t score_blocks() const { return rows / tokens * ceil_div(tokens, kTile); }
};

struct SelectPlan {
  const char *x;
  const float *score;
  char *kept_x;
  int64_t *index;
  int64_t batch, batch_stride, token_stride, row_bytes, prefix;  // strides in bytes
  int tokens, keep, blocks_per_image;

  SelectPlan(const dvit_tokens &shape, const void *x, const float *score, void *kept_x, int64_t *index)
      : x(static_cast<const char *>(x)), score(score), kept_x(static_cast<char *>(kept_x)), index(index),
        batch(shape.batch), batch_stride(stride_of(shape.batch_stride, shape.batch) * size_of(shape.dtype)),
        token_stride(stride_of(shape.token_stride, shape.prefix + shape.tokens) * size_of(shape.dtype)),
        row_bytes(shape.channels * size_of(shape.dtype)), prefix(shape.prefix), tokens(static_cast<int>(shape.tokens)),
        keep(static_cast<int>(shape.keep)) {
    // Few pictures: a block for every 16 rows. Many: two a picture, so that choosing is not repeated so often.
    const int64_t wanted = shape.batch < 256 ? 512 / shape.batch : 2;
    blocks_per_image = static_cast<int>(smaller(ceil_div<int64_t>(prefix + keep, 16), wanted));
  }

  int64_t blocks() const { return batch * blocks_per_image; }

  // The largest unit, in bytes, that all rows and their starts are multiples of; at most 16.
  int64_t unit() const {
    const uint64_t all = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(kept_x) |
                         static_cast<uint64_t>(batch_stride) | static_cast<uint64_t>(token_stride) |
                         static_cast<uint64_t>(row_bytes) | 16u;
    return static_cast<int64_t>(all & -all);
  }
};

}  // namespace DVIT_LEVEL
}  // namespace dvit
