// The arithmetic of a few token rows on a CPU; one table for each level of processor, the best chosen at run time.
#pragma once

#include "common.h"

namespace dvit {

struct Rows {
  int block;  // rows that `linear` computes together
  int panel;  // columns likewise; packed matrices are padded to a multiple

  // Rows [first, first + panel) of a row-major matrix (out, in), as one panel (in, panel) of float32; rows beyond `out`
  // are 0.
  void (*pack)(int32_t dtype, const void *matrix, int64_t first, int64_t out, int64_t in, float *panel);

  // (x - mean) / sqrt(variance + eps) of c channels, in float32.
  void (*normalise)(int32_t dtype, const void *x, int64_t c, float eps, float *y);

  // y = a W^T + bias for `block` rows of `in` float32 values each, W being packed. Columns of y beyond `out`, to the
  // end of a panel, are scratch.
  void (*linear)(const float *a, int64_t a_stride, int64_t in, const float *packed, const float *bias, int64_t out,
                 float *y, int64_t y_stride);

  // GELU in its exact form, by erf, in place; then rounded to the dtype.
  void (*gelu)(int32_t dtype, float *y, int64_t count);
};

}  // namespace dvit
