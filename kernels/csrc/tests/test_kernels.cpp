// The CUDA kernels, run by threads of the host, against scores in double precision and the CPU's choice. Tensor cores
// are the one thing that is not theirs here: halves are multiplied as floats are.
#include "../cuda/launches.h"

#include "check.h"

namespace {

using namespace dvit;

template <class Kernel, class Given>
dvit_status emulate(const char *, Kernel kernel, int64_t blocks, int threads, const Given &plan) {
  emulation::launch(kernel, blocks, threads, plan);
  return DVIT_OK;
}

constexpr auto launch = [](auto... given) { return emulate(given...); };

template <class T>
void check_prune(int batch, int prefix, int tokens, int channels, int keep, int gap) {
  Case<T> c(batch, prefix, tokens, channels, keep, gap);
  const size_t bytes = Plan<T>(c.shape, c.predictor, c.eps, nullptr, nullptr).bytes;
  std::vector<char> workspace(bytes + 2, 'w');
  const Plan<T> plan(c.shape, c.predictor, c.eps, c.x.data(), workspace.data() + 1);
  CHECK(launch_score(plan, launch) == DVIT_OK);
  c.check_scores(plan.score);
  CHECK(launch_select(SelectPlan(c.shape, c.x.data(), plan.score, c.kept_x.data(), c.index.data()), launch) == DVIT_OK);
  c.check_outputs(plan.score);
  CHECK(workspace.front() == 'w' && workspace.back() == 'w');
  std::vector<int64_t> index(c.index.size());
  CHECK(dvit_select_gather(&c.shape, c.x.data(), plan.score, c.kept_x.data(), index.data(), 1) == DVIT_OK);
  CHECK(index == c.index);
}

// A stride that is never taken neither overflows nor costs the fast loads.
void check_single_strides() {
  Case<float> c(1, 0, 1, 64, 1);
  c.shape.batch_stride = c.shape.token_stride = INT64_MAX;
  alignas(16) static float x[64];
  CHECK(Plan<float>(c.shape, c.predictor, c.eps, x, nullptr).x_aligned);
  const SelectPlan plan(c.shape, x, nullptr, nullptr, nullptr);
  CHECK(plan.batch_stride == 0 && plan.token_stride == 0 && plan.unit() == 16);
}

}  // namespace

int main() {
  check_single_strides();
  check_prune<float>(2, 1, 70, 64, 35, 0);  // tiles across pictures, two tiles a picture
  check_prune<float>(70, 1, 1, 64, 1, 0);   // as many pictures in a tile as there can be
  check_prune<float>(1, 5, 20, 96, 20, 3);  // tiles across the halves, nothing aligned, all kept
  check_prune<float>(1, 0, 3, 1024, 2, 0);
  check_prune<Float16>(3, 2, 33, 96, 7, 0);
  check_prune<BFloat16>(1, 1, 33, 64, 7, 1);
  std::puts("kernels: right, as run by threads of the host");
}
