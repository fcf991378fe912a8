// The CPU half of the C API: checks, how many threads are worth it, and the work.
#include <algorithm>

#include "checks.h"
#include "pruning.h"

namespace dvit {
namespace {

// Less than this for a thread is not worth starting it: multiply-adds, or bytes to copy.
constexpr double kLeastWork = 1e6;

int threads_for(int threads, double work, int64_t parts) {
  const double useful = std::min(work / kLeastWork, static_cast<double>(parts));
  return static_cast<int>(std::max(1.0, std::min<double>(threads ? threads : usual_threads(), useful)));
}

int pruning_threads(const dvit_tokens &shape, int threads) {
  const double c = static_cast<double>(shape.channels);
  const double rows = static_cast<double>(shape.batch) * static_cast<double>(shape.tokens);
  return threads_for(threads, rows * c * c, shape.batch * ceil_div<int64_t>(shape.tokens, best_rows().block));
}

dvit_status check_channels(const dvit_tokens &shape) {
  if (shape.channels >= 4 && shape.channels % 2 == 0) return DVIT_OK;
  return fail(DVIT_UNSUPPORTED, "shape.channels: %lld; an even number of 4 or more is supported",
              static_cast<long long>(shape.channels));
}

}  // namespace
}  // namespace dvit

using dvit::Pruning;

dvit_status dvit_select_gather(const dvit_tokens *shape, const void *x, const float *score, void *kept_x,
                               int64_t *index, int threads) {
  DVIT_TRY(dvit::check_shape(shape));
  DVIT_TRY(dvit::check_threads(threads));
  if (shape->batch == 0) return DVIT_OK;
  DVIT_TRY(dvit::check_tensors(*shape, x, kept_x, index));
  DVIT_TRY(dvit::check_pointer(score, sizeof(float), "score"));
  const dvit::Selection selection{*shape, static_cast<const char *>(x), score, static_cast<char *>(kept_x), index};
  const dvit::Step<dvit::Selection> steps[] = {{shape->batch, &dvit::Selection::choose}};
  dvit::run_steps(selection, steps, dvit::threads_for(threads, selection.bytes(), shape->batch));
  return DVIT_OK;
}

dvit_status dvit_prune_tokens_workspace(const dvit_tokens *shape, int threads, size_t *bytes) {
  DVIT_TRY(dvit::check_shape(shape));
  DVIT_TRY(dvit::check_channels(*shape));
  DVIT_TRY(dvit::check_threads(threads));
  DVIT_TRY(dvit::check_pointer(bytes, sizeof(size_t), "bytes"));
  const dvit_predictor none = {};
  *bytes = Pruning(*shape, none, 0, nullptr, nullptr, nullptr, nullptr, dvit::pruning_threads(*shape, threads)).bytes;
  return DVIT_OK;
}

dvit_status dvit_prune_tokens(const dvit_tokens *shape, const dvit_predictor *predictor, float eps, const void *x,
                              void *kept_x, int64_t *index, void *workspace, size_t workspace_bytes, int threads) {
  DVIT_TRY(dvit::check_shape(shape));
  DVIT_TRY(dvit::check_channels(*shape));
  DVIT_TRY(dvit::check_threads(threads));
  if (shape->batch == 0) return DVIT_OK;
  DVIT_TRY(dvit::check_tensors(*shape, x, kept_x, index));
  DVIT_TRY(dvit::check_predictor(*shape, predictor, eps));
  const int team = dvit::pruning_threads(*shape, threads);
  const Pruning pruning(*shape, *predictor, eps, x, kept_x, index, workspace, team);
  DVIT_TRY(dvit::check_workspace(workspace, workspace_bytes, pruning.bytes));
  pruning.run();
  return DVIT_OK;
}
