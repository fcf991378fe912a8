// What the tests share: CHECK, random values, a random batch with its predictor, and the scores in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "common.h"

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

namespace dvit {

inline std::vector<float> random_values(int64_t count, unsigned seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float &value : values) value = normal(generator);
  return values;
}

template <class T>
std::vector<T> as(const std::vector<float> &values) {
  std::vector<T> converted(values.size());
  for (size_t i = 0; i < values.size(); ++i) converted[i] = from_float<T>(values[i]);
  return converted;
}

template <class T>
constexpr int32_t dtype_of() {
  return sizeof(T) == 4 ? DVIT_FLOAT32 : std::is_same<T, Float16>::value ? DVIT_FLOAT16 : DVIT_BFLOAT16;
}

// A batch of random tokens with room between rows and pictures, a predictor, and outputs.
template <class T>
struct Case {
  dvit_tokens shape;
  std::vector<T> x, w1, w2_own, w2_mean, w3, kept_x;
  std::vector<float> w1_sum, b1, b2, b3, w4, b4;
  std::vector<int64_t> index;
  dvit_predictor predictor;
  static constexpr float eps = 1e-5f;

  Case(int64_t batch, int64_t prefix, int64_t tokens, int64_t channels, int64_t keep, int64_t gap = 0) {
    const int64_t c = channels, half = c / 2, quarter = c / 4, row = c + gap;
    shape = {dtype_of<T>(), batch, prefix, tokens, c, keep, row * (prefix + tokens) + gap, row};
    const unsigned seed = static_cast<unsigned>(batch * 1000 + tokens);
    x = as<T>(random_values(batch * shape.batch_stride, seed));
    const auto matrix = [&](int64_t out, int64_t in, int which) {
      return as<T>(random_values(out * in, seed + which, 1.2f / std::sqrt(static_cast<float>(in))));
    };
    w1 = matrix(c, c, 1);
    w2_own = matrix(half, half, 2);
    w2_mean = matrix(half, half, 3);
    w3 = matrix(quarter, half, 4);
    for (int64_t i = 0; i < c; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < c; ++k) sum += to_float(w1[i * c + k]);
      w1_sum.push_back(static_cast<float>(sum));
    }
    b1 = random_values(c, seed + 5, 0.1f);
    b2 = random_values(half, seed + 6, 0.1f);
    b3 = random_values(quarter, seed + 7, 0.1f);
    w4 = random_values(quarter, seed + 8, 3 / std::sqrt(static_cast<float>(quarter)));
    b4 = {0.25f};
    predictor = {w1.data(), w1_sum.data(), b1.data(), w2_own.data(), w2_mean.data(),
                 b2.data(), w3.data(),     b3.data(), w4.data(),     b4.data()};
    kept_x.resize(batch * (prefix + keep) * c);
    index.resize(batch * keep);
  }

  const T *row(int64_t image, int64_t token) const {
    return x.data() + image * shape.batch_stride + token * shape.token_stride;
  }

  // The scores by the plain formulas in double precision; `rounded`: with everything that plain PyTorch keeps in the
  // dtype rounded to it.
  std::vector<double> scores(bool rounded = false) const {
    const auto kept = [rounded](double v) {
      return rounded ? static_cast<double>(to_float(from_float<T>(static_cast<float>(v)))) : v;
    };
    const int64_t c = shape.channels, half = c / 2, n = shape.tokens;
    const auto gelu = [](double v) { return 0.5 * v * std::erfc(-v / std::sqrt(2.0)); };
    const auto dot = [](const T *w, const double *v, int64_t count) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += to_float(w[i]) * v[i];
      return sum;
    };
    std::vector<double> scores, hidden(n * c), normed(c), mean(half), second(half);
    for (int64_t image = 0; image < shape.batch; ++image) {
      std::fill(mean.begin(), mean.end(), 0.0);
      for (int64_t t = 0; t < n; ++t) {
        const T *from = row(image, shape.prefix + t);
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < c; ++i) sum += normed[i] = to_float(from[i]);
        for (double &v : normed) squares += (v - sum / c) * (v - sum / c);
        for (double &v : normed) v = kept((v - sum / c) / std::sqrt(squares / c + eps));
        for (int64_t i = 0; i < c; ++i) hidden[t * c + i] = kept(gelu(kept(dot(&w1[i * c], normed.data(), c) + b1[i])));
        for (int64_t i = 0; i < half; ++i) mean[i] += hidden[t * c + half + i] / n;
      }
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t i = 0; i < half; ++i)
          second[i] = kept(gelu(kept(kept(dot(&w2_own[i * half], &hidden[t * c], half)) +
                                     kept(dot(&w2_mean[i * half], mean.data(), half) + b2[i]))));
        double score = b4[0];
        for (int64_t i = 0; i < c / 4; ++i)
          score += w4[i] * kept(gelu(kept(dot(&w3[i * half], second.data(), half) + b3[i])));
        scores.push_back(score);
      }
    }
    return scores;
  }

  // Arithmetic is right when it strays from double precision at most twice as far as plain PyTorch does.
  void check_scores(const float *got) const {
    const std::vector<double> right = scores(), plain = scores(true);
    double ours = 0, theirs = 0;
    for (size_t i = 0; i < right.size(); ++i) {
      ours += (got[i] - right[i]) * (got[i] - right[i]);
      theirs += (plain[i] - right[i]) * (plain[i] - right[i]);
    }
    const double count = static_cast<double>(right.size());
    CHECK(std::sqrt(ours / count) <= 2 * std::sqrt(theirs / count) + 1e-6);
  }

  // The outputs follow from the scores: prefix rows, ascending positions, equal rows, and no token stays that is worse
  // than one that went.
  void check_outputs(const float *scores) const {
    const int64_t p = shape.prefix, k = shape.keep, n = shape.tokens, c = shape.channels;
    for (int64_t image = 0; image < shape.batch; ++image) {
      const int64_t *positions = &index[image * k];
      const T *rows = &kept_x[image * (p + k) * c];
      std::vector<bool> stays(n);
      for (int64_t i = 0; i < p + k; ++i) {
        const int64_t source = i < p ? i : p + positions[i - p];
        CHECK(memcmp(rows + i * c, row(image, source), c * sizeof(T)) == 0);
      }
      float worst = INFINITY, best = -INFINITY;
      for (int64_t i = 0; i < k; ++i) {
        CHECK(positions[i] >= 0 && positions[i] < n && (i == 0 || positions[i] > positions[i - 1]));
        stays[positions[i]] = true;
        worst = std::min(worst, scores[image * n + positions[i]]);
      }
      for (int64_t t = 0; t < n; ++t)
        if (!stays[t]) best = std::max(best, scores[image * n + t]);
      CHECK(best <= worst);
    }
  }
};

}  // namespace dvit
