// prune_tokens on a CPU as steps for a team: pack the weights, project, share, rate, choose.
#pragma once

#include <algorithm>
#include <cstring>

#include "levels.h"
#include "select.h"
#include "team.h"
#include "workspace.h"

namespace dvit {

// Choosing and copying; scores are there or come from Scoring.
struct Selection {
  const dvit_tokens &shape;
  const char *x;
  const float *score;
  char *kept_x;
  int64_t *index;

  const char *row(int64_t image, int64_t token) const {
    return x + (image * shape.batch_stride + token * shape.token_stride) * size_of(shape.dtype);
  }

  void choose(int64_t image, int) const {
    OneThread alone;
    const float *scores = score + image * shape.tokens;
    int64_t *positions = index + image * shape.keep;
    select_tokens(alone, [scores](int64_t i) { return order_key(scores[i]); }, shape.tokens, shape.keep, positions);
    const size_t row_bytes = shape.channels * size_of(shape.dtype);
    char *to = kept_x + image * (shape.prefix + shape.keep) * row_bytes;
    for (int64_t t = 0; t < shape.prefix; ++t, to += row_bytes) memcpy(to, row(image, t), row_bytes);
    for (int64_t i = 0; i < shape.keep; ++i, to += row_bytes)
      memcpy(to, row(image, shape.prefix + positions[i]), row_bytes);
  }

  double bytes() const {
    return static_cast<double>(shape.batch) * static_cast<double>((shape.keep + shape.prefix) * shape.channels) *
           static_cast<double>(size_of(shape.dtype));
  }
};

// Rows [begin, begin + out) of a row-major matrix with `in` columns, and where they go as panels; see Rows.
struct Packed {
  const void *matrix;
  int64_t begin, out, in;
  float *panels;
};

// The whole op. A picture is cut into blocks of Rows::block tokens, `blocks_per_tile` of which are a part of the work.
// Sums over a picture are taken block by block, so that results do not depend on how the work was cut.
struct Pruning {
  enum { kOwn, kAveraged, kSecond, kMean, kThird, kMatrices };

  const dvit_tokens &shape;
  const dvit_predictor &predictor;
  const float eps;
  const Rows &rows;
  const int threads;
  const int64_t half = shape.channels / 2, quarter = shape.channels / 4;
  const int64_t wide = round_up<int64_t>(half, rows.panel);  // a padded row of half as many channels
  const int64_t blocks = ceil_div<int64_t>(shape.tokens, rows.block);
  const int64_t blocks_per_tile = shape.batch * ceil_div<int64_t>(blocks, 4) < 2 * threads ? 1 : 4;
  const int64_t tiles = ceil_div(blocks, blocks_per_tile);
  int64_t panels[kMatrices + 1] = {};  // of all matrices before this one
  Packed packed[kMatrices];
  float *hidden, *sums, *shared, *score, *buffers;
  int64_t buffer_size;
  size_t bytes;
  Selection selection;

  Pruning(const dvit_tokens &shape, const dvit_predictor &predictor, float eps, const void *x, void *kept_x,
          int64_t *index, void *memory, int threads)
      : shape(shape), predictor(predictor), eps(eps), rows(best_rows()), threads(threads),
        selection{shape, static_cast<const char *>(x), nullptr, static_cast<char *>(kept_x), index} {
    const int64_t c = shape.channels;
    packed[kOwn] = {predictor.w1, 0, half, c, nullptr};
    packed[kAveraged] = {predictor.w1, half, half, c, nullptr};
    packed[kSecond] = {predictor.w2_own, 0, half, half, nullptr};
    packed[kMean] = {predictor.w2_mean, 0, half, half, nullptr};
    packed[kThird] = {predictor.w3, 0, quarter, half, nullptr};
    Workspace workspace(memory);
    for (int i = 0; i < kMatrices; ++i) {
      const int64_t width = round_up<int64_t>(packed[i].out, rows.panel);
      packed[i].panels = workspace.take<float>(width * packed[i].in);
      panels[i + 1] = panels[i] + width / rows.panel;
    }
    hidden = workspace.take<float>(shape.batch * blocks * rows.block * wide);
    sums = workspace.take<float>(shape.batch * blocks * half);
    shared = workspace.take<float>(round_up<int64_t>(shape.batch, rows.block) * wide);
    score = workspace.take<float>(shape.batch * shape.tokens);
    // A block of normalised tokens and one of results; or two of results.
    buffer_size = rows.block * (std::max(c, wide) + wide);
    buffers = workspace.take<float>(threads * buffer_size);
    bytes = workspace.bytes();
    selection.score = score;
  }

  float *buffer(int member) const { return buffers + member * buffer_size; }

  void linear(const float *a, int64_t a_stride, int matrix, const float *bias, float *y) const {
    rows.linear(a, a_stride, packed[matrix].in, packed[matrix].panels, bias, packed[matrix].out, y, wide);
  }

  void activate(float *y, int64_t count, int32_t dtype) const {
    for (int r = 0; r < rows.block; ++r) rows.gelu(dtype, y + r * wide, count);
  }

  void pack(int64_t part, int) const {
    const int which = static_cast<int>(std::upper_bound(panels, panels + kMatrices + 1, part) - panels) - 1;
    const Packed &m = packed[which];
    const int64_t first = (part - panels[which]) * rows.panel;
    rows.pack(shape.dtype, m.matrix, m.begin + first, m.begin + m.out, m.in, m.panels + first * m.in);
  }

  // First layer: the own half goes to `hidden`, of the averaged half the block's sums.
  void project(int64_t part, int member) const {
    const int64_t image = part / tiles, end = std::min(blocks, (part % tiles + 1) * blocks_per_tile);
    float *normed = buffer(member), *averaged = normed + rows.block * std::max(shape.channels, wide);
    for (int64_t block = part % tiles * blocks_per_tile; block < end; ++block) {
      const int64_t first = block * rows.block, there = std::min<int64_t>(rows.block, shape.tokens - first);
      for (int64_t r = 0; r < there; ++r)
        rows.normalise(shape.dtype, selection.row(image, shape.prefix + first + r), shape.channels, eps,
                       normed + r * shape.channels);
      std::fill(normed + there * shape.channels, normed + rows.block * shape.channels, 0.0f);
      float *own = hidden + (image * blocks + block) * rows.block * wide;
      linear(normed, shape.channels, kOwn, predictor.b1, own);
      activate(own, half, shape.dtype);
      linear(normed, shape.channels, kAveraged, predictor.b1 + half, averaged);
      activate(averaged, half, DVIT_FLOAT32);
      float *sum = sums + (image * blocks + block) * half;
      std::fill(sum, sum + half, 0.0f);
      for (int64_t r = 0; r < there; ++r)
        for (int64_t i = 0; i < half; ++i) sum[i] += averaged[r * wide + i];
    }
  }

  // The mean half's part of the second layer, for as many pictures as a block has rows.
  void share(int64_t part, int member) const {
    float *means = buffer(member);
    std::fill(means, means + rows.block * wide, 0.0f);
    for (int64_t r = 0; r < std::min<int64_t>(rows.block, shape.batch - part * rows.block); ++r) {
      const float *sum = sums + (part * rows.block + r) * blocks * half;
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t i = 0; i < half; ++i) means[r * wide + i] += sum[block * half + i];
      for (int64_t i = 0; i < half; ++i) means[r * wide + i] /= static_cast<float>(shape.tokens);
    }
    linear(means, wide, kMean, predictor.b2, shared + part * rows.block * wide);
  }

  // Second, third and last layer.
  void rate(int64_t part, int member) const {
    const int64_t image = part / tiles, end = std::min(blocks, (part % tiles + 1) * blocks_per_tile);
    float *second = buffer(member), *third = second + rows.block * wide;
    for (int64_t block = part % tiles * blocks_per_tile; block < end; ++block) {
      const int64_t first = block * rows.block, there = std::min<int64_t>(rows.block, shape.tokens - first);
      linear(hidden + (image * blocks + block) * rows.block * wide, wide, kSecond, shared + image * wide, second);
      activate(second, half, shape.dtype);
      linear(second, wide, kThird, predictor.b3, third);
      activate(third, quarter, DVIT_FLOAT32);
      for (int64_t r = 0; r < there; ++r) {
        float total = 0;
        for (int64_t i = 0; i < quarter; ++i) total += third[r * wide + i] * predictor.w4[i];
        score[image * shape.tokens + first + r] = total + predictor.b4[0];
      }
    }
  }

  void choose(int64_t image, int member) const { selection.choose(image, member); }

  void run() const {
    const Step<Pruning> steps[] = {
        {panels[kMatrices], &Pruning::pack},
        {shape.batch * tiles, &Pruning::project},
        {ceil_div<int64_t>(shape.batch, rows.block), &Pruning::share},
        {shape.batch * tiles, &Pruning::rate},
        {shape.batch, &Pruning::choose},
    };
    run_steps(*this, steps, threads);
  }
};

}  // namespace dvit
