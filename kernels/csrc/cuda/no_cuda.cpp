// The CUDA half of the C API in a build without CUDA.
#include "../checks.h"

static dvit_status no_cuda() { return dvit::fail(DVIT_NO_CUDA, "this library was built without CUDA"); }

int dvit_has_cuda(void) { return 0; }

dvit_status dvit_cuda_select_gather(const dvit_tokens *, const void *, const float *, void *, int64_t *, void *) {
  return no_cuda();
}

dvit_status dvit_cuda_prune_tokens_workspace(const dvit_tokens *, size_t *) { return no_cuda(); }

dvit_status dvit_cuda_prune_tokens(const dvit_tokens *, const dvit_predictor *, float, const void *, void *, int64_t *,
                                   void *, size_t, void *) {
  return no_cuda();
}
