// The arithmetic of a few token rows, in vectors as wide as the level it is compiled for has.
//
// Nothing here may use the standard library's inline functions: see DVIT_LEVEL in common.h.
#include "rows.h"

namespace dvit {
inline namespace DVIT_LEVEL {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kBlock = 14;  // 2 x 14 sums and 2 vectors of weights fill 30 of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8, kBlock = 6;  // 12 and 2 of 16
#else
constexpr int kWidth = 4, kBlock = 6;
#endif
constexpr int kPanel = 2 * kWidth;
constexpr int64_t kStretch = 128;  // products that are summed by themselves: rounding grows with what one sum takes up

typedef float Vector __attribute__((vector_size(4 * kWidth)));

static inline Vector load(const float *from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

static inline void store(float *to, Vector v) { __builtin_memcpy(to, &v, sizeof(v)); }

static inline float sum_of(Vector v) {
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

template <class T>
static void pack_as(const void *matrix, int64_t first, int64_t out, int64_t in, float *panel) {
  const T *rows = static_cast<const T *>(matrix) + first * in;
  const int there = static_cast<int>(smaller<int64_t>(kPanel, out - first));
  for (int j = there; j < kPanel; ++j)
    for (int64_t k = 0; k < in; ++k) panel[k * kPanel + j] = 0;
  // Eight values of every row at a time: a cache line of the source is used while it is near.
  for (int64_t start = 0; start < in; start += 8)
    for (int j = 0; j < there; ++j)
      for (int64_t k = start; k < smaller<int64_t>(in, start + 8); ++k)
        panel[k * kPanel + j] = to_float(rows[j * in + k]);
}

template <class T>
static void normalise_as(const void *from, int64_t c, float eps, float *y) {
  const T *x = static_cast<const T *>(from);
  for (int64_t i = 0; i < c; ++i) y[i] = to_float(x[i]);
  const int64_t whole = c - c % kWidth;
  Vector sums = {};
  for (int64_t i = 0; i < whole; i += kWidth) sums += load(y + i);
  float sum = sum_of(sums);
  for (int64_t i = whole; i < c; ++i) sum += y[i];
  const float count = static_cast<float>(c), mean = sum / count;
  // Deviations from the rounded mean have a small mean of their own, which counts where tokens are far from zero.
  Vector rests = {}, squares = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    const Vector deviation = load(y + i) - mean;
    store(y + i, deviation);
    rests += deviation;
    squares += deviation * deviation;
  }
  float rest = sum_of(rests), square = sum_of(squares);
  for (int64_t i = whole; i < c; ++i) {
    y[i] -= mean;
    rest += y[i];
    square += y[i] * y[i];
  }
  rest /= count;
  const float scale = 1 / __builtin_sqrtf(square / count - rest * rest + eps);
  for (int64_t i = 0; i < c; ++i) y[i] = (y[i] - rest) * scale;
}

// Adds the product to y.
static void product(const float *a, int64_t a_stride, int64_t in, const float *panel, float *y, int64_t y_stride) {
  Vector sums[kBlock][2] = {};
  for (int64_t k = 0; k < in; ++k) {
    const Vector low = load(panel + k * kPanel), high = load(panel + k * kPanel + kWidth);
    for (int r = 0; r < kBlock; ++r) {
      const float value = a[r * a_stride + k];
      sums[r][0] += value * low;
      sums[r][1] += value * high;
    }
  }
  for (int r = 0; r < kBlock; ++r) {
    store(y + r * y_stride, load(y + r * y_stride) + sums[r][0]);
    store(y + r * y_stride + kWidth, load(y + r * y_stride + kWidth) + sums[r][1]);
  }
}

static void linear(const float *a, int64_t a_stride, int64_t in, const float *packed, const float *bias, int64_t out,
                   float *y, int64_t y_stride) {
  for (int64_t column = 0; column < out; column += kPanel) {
    const int64_t biases = smaller<int64_t>(kPanel, out - column);
    for (int r = 0; r < kBlock; ++r)
      for (int64_t i = 0; i < kPanel; ++i) y[r * y_stride + column + i] = i < biases ? bias[column + i] : 0;
    for (int64_t k = 0; k < in; k += kStretch)
      product(a + k, a_stride, smaller(kStretch, in - k), packed + column * in + k * kPanel, y + column, y_stride);
  }
}

// erf as the odd rational function of Eigen and XLA (generic_fast_erf_float), x clamped to where erf is 1 in float32.
static inline float gelu_of(float x) {
  float z = x * 0.70710678118654752f;
  z = z > 4.0f ? 4.0f : z;
  z = z < -4.0f ? -4.0f : z;
  const float t = z * z;
  float p = -2.72614225801306e-10f;
  p = p * t + 2.77068142495902e-08f;
  p = p * t - 2.10102402082508e-06f;
  p = p * t - 5.69250639462346e-05f;
  p = p * t - 7.34990630326855e-04f;
  p = p * t - 2.95459980854025e-03f;
  p = p * t - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * t - 2.13374055278905e-04f;
  q = q * t - 1.68282697438203e-03f;
  q = q * t - 7.37332916720468e-03f;
  q = q * t - 1.42647390514189e-02f;
  return 0.5f * x * (1.0f + z * p / q);
}

template <class T>
static void gelu_as(float *y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = to_float(from_float<T>(gelu_of(y[i])));
}

static void pack(int32_t dtype, const void *matrix, int64_t first, int64_t out, int64_t in, float *panel) {
  const auto as = dtype == DVIT_FLOAT32 ? pack_as<float> : dtype == DVIT_FLOAT16 ? pack_as<Float16> : pack_as<BFloat16>;
  as(matrix, first, out, in, panel);
}

static void normalise(int32_t dtype, const void *x, int64_t c, float eps, float *y) {
  const auto as = dtype == DVIT_FLOAT32   ? normalise_as<float>
                  : dtype == DVIT_FLOAT16 ? normalise_as<Float16>
                                          : normalise_as<BFloat16>;
  as(x, c, eps, y);
}

static void gelu(int32_t dtype, float *y, int64_t count) {
  const auto as = dtype == DVIT_FLOAT32 ? gelu_as<float> : dtype == DVIT_FLOAT16 ? gelu_as<Float16> : gelu_as<BFloat16>;
  as(y, count);
}

extern const Rows rows;
const Rows rows = {kBlock, kPanel, pack, normalise, linear, gelu};

}  // namespace DVIT_LEVEL
}  // namespace dvit
