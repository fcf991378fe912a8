// Version, errors, and the checks of arguments.
#include "checks.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace dvit {
namespace {

thread_local char message[256] = "";

// Far beyond any memory, and far enough below 2^63 that padding and element sizes do not matter.
constexpr double kMostElements = 0x1p48;
constexpr int64_t kMostChannels = 1 << 20;

dvit_status check_range(const char *name, int64_t value, int64_t least, int64_t most) {
  if (least <= value && value <= most) return DVIT_OK;
  return fail(DVIT_INVALID, "%s: %lld; %lld to %lld is expected", name, static_cast<long long>(value),
              static_cast<long long>(least), static_cast<long long>(most));
}

}  // namespace

dvit_status fail(dvit_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  return status;
}

dvit_status check_shape(const dvit_tokens *shape) {
  DVIT_TRY(check_pointer(shape, alignof(dvit_tokens), "shape"));
  const dvit_tokens &s = *shape;
  DVIT_TRY(check_range("shape.dtype", s.dtype, DVIT_FLOAT32, DVIT_BFLOAT16));
  const int64_t most = static_cast<int64_t>(kMostElements);
  DVIT_TRY(check_range("shape.batch", s.batch, 0, most));
  DVIT_TRY(check_range("shape.prefix", s.prefix, 0, most));
  DVIT_TRY(check_range("shape.tokens", s.tokens, 1, most));
  DVIT_TRY(check_range("shape.channels", s.channels, 1, kMostChannels));
  DVIT_TRY(check_range("shape.keep", s.keep, 1, s.tokens));
  const double rows = static_cast<double>(s.prefix + s.tokens);
  if (std::fmax(1.0, static_cast<double>(s.batch)) * rows * static_cast<double>(s.channels) > kMostElements)
    return fail(DVIT_INVALID, "shape: batch, tokens and channels make more elements than there can be");
  // A stride is taken one time less than there are pictures or rows: that of a single one may be anything.
  const double reach = std::fabs(static_cast<double>(s.batch_stride)) * std::fmax(0, static_cast<double>(s.batch) - 1) +
                       std::fabs(static_cast<double>(s.token_stride)) * (rows - 1);
  if (reach > kMostElements) return fail(DVIT_INVALID, "shape: the strides reach further than memory can");
  return DVIT_OK;
}

dvit_status check_pointer(const void *pointer, size_t alignment, const char *name) {
  if (pointer == nullptr) return fail(DVIT_INVALID, "%s: is null", name);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    return fail(DVIT_INVALID, "%s: is not aligned to %zu bytes", name, alignment);
  return DVIT_OK;
}

dvit_status check_tensors(const dvit_tokens &shape, const void *x, const void *kept_x, const void *index) {
  const size_t element = size_of(shape.dtype);
  DVIT_TRY(check_pointer(x, element, "x"));
  DVIT_TRY(check_pointer(kept_x, element, "kept_x"));
  return check_pointer(index, sizeof(int64_t), "index");
}

dvit_status check_predictor(const dvit_tokens &shape, const dvit_predictor *predictor, float eps) {
  const size_t element = size_of(shape.dtype);
  DVIT_TRY(check_pointer(predictor, alignof(dvit_predictor), "predictor"));
  DVIT_TRY(check_pointer(predictor->w1, element, "predictor.w1"));
  DVIT_TRY(check_pointer(predictor->w1_sum, sizeof(float), "predictor.w1_sum"));
  DVIT_TRY(check_pointer(predictor->b1, sizeof(float), "predictor.b1"));
  DVIT_TRY(check_pointer(predictor->w2_own, element, "predictor.w2_own"));
  DVIT_TRY(check_pointer(predictor->w2_mean, element, "predictor.w2_mean"));
  DVIT_TRY(check_pointer(predictor->b2, sizeof(float), "predictor.b2"));
  DVIT_TRY(check_pointer(predictor->w3, element, "predictor.w3"));
  DVIT_TRY(check_pointer(predictor->b3, sizeof(float), "predictor.b3"));
  DVIT_TRY(check_pointer(predictor->w4, sizeof(float), "predictor.w4"));
  DVIT_TRY(check_pointer(predictor->b4, sizeof(float), "predictor.b4"));
  if (!(eps >= 0.0f && eps <= 1e30f)) return fail(DVIT_INVALID, "eps: %g; a number of 0 or more is expected", eps);
  return DVIT_OK;
}

dvit_status check_workspace(const void *workspace, size_t bytes, size_t needed) {
  DVIT_TRY(check_pointer(workspace, 1, "workspace"));
  if (bytes >= needed) return DVIT_OK;
  return fail(DVIT_WORKSPACE, "workspace_bytes: %zu; %zu are needed", bytes, needed);
}

dvit_status check_threads(int threads) { return check_range("threads", threads, 0, 1 << 16); }

}  // namespace dvit

const char *dvit_version(void) { return DVIT_VERSION; }

const char *dvit_last_error(void) { return dvit::message; }

const char *dvit_status_string(int status) {
  switch (status) {
    case DVIT_OK:
      return "success";
    case DVIT_INVALID:
      return "invalid argument";
    case DVIT_UNSUPPORTED:
      return "unsupported size";
    case DVIT_WORKSPACE:
      return "workspace too small";
    case DVIT_NO_CUDA:
      return "built without CUDA";
    case DVIT_CUDA_ERROR:
      return "CUDA error";
  }
  return "unknown status";
}
