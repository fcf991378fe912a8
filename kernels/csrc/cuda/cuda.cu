// The CUDA half of the C API: checks, launches, errors.
#include <climits>

#include "../checks.h"
#include "launches.h"

namespace dvit {
namespace {

dvit_status check_size(const char *name, int64_t value, int64_t most) {
  if (value <= most) return DVIT_OK;
  return fail(DVIT_UNSUPPORTED, "%s: %lld; at most %lld is supported on CUDA", name, static_cast<long long>(value),
              static_cast<long long>(most));
}

dvit_status check_channels(int64_t channels) {
  if (kLeastChannels <= channels && channels <= kMostChannels && channels % 32 == 0) return DVIT_OK;
  return fail(DVIT_UNSUPPORTED, "shape.channels: %lld; %d to %d in multiples of 32 are supported on CUDA",
              static_cast<long long>(channels), kLeastChannels, kMostChannels);
}

struct Launcher {
  cudaStream_t stream;

  template <class Kernel, class Given>
  dvit_status operator()(const char *name, Kernel kernel, int64_t blocks, int threads, const Given &plan) const {
    if (blocks > INT_MAX)
      return fail(DVIT_UNSUPPORTED, "shape.batch: %s would need %lld blocks", name, static_cast<long long>(blocks));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, plan);
    if (error == cudaSuccess) return DVIT_OK;
    cudaGetLastError();  // it is reported here and need not trouble a later call
    return fail(DVIT_CUDA_ERROR, "%s: %s: %s", name, cudaGetErrorName(error), cudaGetErrorString(error));
  }
};

template <class T>
dvit_status prune(const dvit_tokens &shape, const dvit_predictor &predictor, float eps, const void *x, void *kept_x,
                  int64_t *index, void *workspace, size_t workspace_bytes, const Launcher &launcher) {
  const Plan<T> plan(shape, predictor, eps, x, workspace);
  DVIT_TRY(check_workspace(workspace, workspace_bytes, plan.bytes));
  DVIT_TRY(launch_score(plan, launcher));
  return launch_select(SelectPlan(shape, x, plan.score, kept_x, index), launcher);
}

}  // namespace
}  // namespace dvit

int dvit_has_cuda(void) { return 1; }

dvit_status dvit_cuda_select_gather(const dvit_tokens *shape, const void *x, const float *score, void *kept_x,
                                    int64_t *index, void *stream) {
  DVIT_TRY(dvit::check_shape(shape));
  DVIT_TRY(dvit::check_size("shape.tokens", shape->tokens, dvit::kMostTokens));
  if (shape->batch == 0) return DVIT_OK;
  DVIT_TRY(dvit::check_tensors(*shape, x, kept_x, index));
  DVIT_TRY(dvit::check_pointer(score, sizeof(float), "score"));
  const dvit::Launcher launcher{static_cast<cudaStream_t>(stream)};
  return dvit::launch_select(dvit::SelectPlan(*shape, x, score, kept_x, index), launcher);
}

dvit_status dvit_cuda_prune_tokens_workspace(const dvit_tokens *shape, size_t *bytes) {
  DVIT_TRY(dvit::check_shape(shape));
  DVIT_TRY(dvit::check_size("shape.tokens", shape->tokens, dvit::kMostTokens));
  DVIT_TRY(dvit::check_channels(shape->channels));
  DVIT_TRY(dvit::check_pointer(bytes, sizeof(size_t), "bytes"));
  const dvit_predictor none = {};
  *bytes = shape->dtype == DVIT_FLOAT32 ? dvit::Plan<float>(*shape, none, 0, nullptr, nullptr).bytes
                                        : dvit::Plan<dvit::Float16>(*shape, none, 0, nullptr, nullptr).bytes;
  return DVIT_OK;
}

dvit_status dvit_cuda_prune_tokens(const dvit_tokens *shape, const dvit_predictor *predictor, float eps, const void *x,
                                   void *kept_x, int64_t *index, void *workspace, size_t workspace_bytes,
                                   void *stream) {
  DVIT_TRY(dvit::check_shape(shape));
  DVIT_TRY(dvit::check_size("shape.tokens", shape->tokens, dvit::kMostTokens));
  DVIT_TRY(dvit::check_channels(shape->channels));
  if (shape->batch == 0) return DVIT_OK;
  DVIT_TRY(dvit::check_tensors(*shape, x, kept_x, index));
  DVIT_TRY(dvit::check_predictor(*shape, predictor, eps));
  const dvit::Launcher launcher{static_cast<cudaStream_t>(stream)};
  const auto prune = shape->dtype == DVIT_FLOAT32   ? dvit::prune<float>
                     : shape->dtype == DVIT_FLOAT16 ? dvit::prune<dvit::Float16>
                                                    : dvit::prune<dvit::BFloat16>;
  return prune(*shape, *predictor, eps, x, kept_x, index, workspace, workspace_bytes, launcher);
}
