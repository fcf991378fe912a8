// What all entry points check, and how they say what is wrong.
#pragma once

#include <cstddef>

#include "common.h"

namespace dvit {

// Leaves the message for this thread and returns the status.
__attribute__((format(printf, 2, 3))) dvit_status fail(dvit_status status, const char *format, ...);

// Sizes, strides and the dtype. What passes can be multiplied and padded in 64 bits without overflow.
dvit_status check_shape(const dvit_tokens *shape);

// Not null, and aligned to `alignment`, a power of two.
dvit_status check_pointer(const void *pointer, size_t alignment, const char *name);

dvit_status check_tensors(const dvit_tokens &shape, const void *x, const void *kept_x, const void *index);

dvit_status check_predictor(const dvit_tokens &shape, const dvit_predictor *predictor, float eps);

dvit_status check_workspace(const void *workspace, size_t bytes, size_t needed);

dvit_status check_threads(int threads);

}  // namespace dvit

// Returns from the function that it is in unless the status is DVIT_OK.
#define DVIT_TRY(expression)                            \
  do {                                                  \
    const dvit_status status_of_try = (expression);     \
    if (status_of_try != DVIT_OK) return status_of_try; \
  } while (false)
