// prune_tokens on the CPU against double precision: dtypes, shapes, strides, threads, odd values; writes stay inside.
#include "../pruning.h"
#include "check.h"

namespace {

using namespace dvit;

template <class T>
void prune(Case<T> &c, int threads) {
  size_t bytes = 0;
  CHECK(dvit_prune_tokens_workspace(&c.shape, threads, &bytes) == DVIT_OK);
  std::vector<char> workspace(bytes + 2, 'w');
  std::fill(c.index.begin(), c.index.end(), -7);
  CHECK(dvit_prune_tokens(&c.shape, &c.predictor, c.eps, c.x.data(), c.kept_x.data(), c.index.data(),
                          workspace.data() + 1, bytes, threads) == DVIT_OK);
  CHECK(workspace.front() == 'w' && workspace.back() == 'w');
}

template <class T>
std::vector<float> scores_of(Case<T> &c) {
  std::vector<char> memory(Pruning(c.shape, c.predictor, c.eps, nullptr, nullptr, nullptr, nullptr, 1).bytes);
  const Pruning pruning(c.shape, c.predictor, c.eps, c.x.data(), c.kept_x.data(), c.index.data(), memory.data(), 1);
  pruning.run();
  return {pruning.score, pruning.score + c.shape.batch * c.shape.tokens};
}

template <class T>
void check_shapes() {
  struct Shape {
    int batch, prefix, tokens, channels, keep, gap;
  };
  const Shape shapes[] = {{3, 1, 50, 64, 35, 0}, {2, 1, 196, 96, 137, 3}, {1, 2, 137, 384, 96, 0},
                          {2, 0, 49, 64, 49, 8}, {40, 1, 1, 64, 1, 0},    {9, 5, 3, 12, 2, 1},
                          {5, 2, 33, 50, 7, 0},  {1, 1, 15, 4, 3, 0}};
  for (const Shape &s : shapes) {
    Case<T> c(s.batch, s.prefix, s.tokens, s.channels, s.keep, s.gap);
    const std::vector<float> scores = scores_of(c);
    c.check_scores(scores.data());
    for (const int threads : {1, 2, 5, 0}) {
      prune(c, threads);
      c.check_outputs(scores.data());
    }
  }
}

void check_odd_values() {
  Case<float> c(3, 1, 30, 64, 11);
  prune(c, 2);
  const auto index = c.index;
  c.x[c.shape.batch_stride + 5 * c.shape.token_stride] = NAN;  // carried to all scores of picture 1 by the mean
  prune(c, 2);
  for (int i = 0; i < 11; ++i) {
    CHECK(c.index[i] == index[i] && c.index[22 + i] == index[22 + i]);
    CHECK(c.index[11 + i] == i);
  }
  c.shape.batch_stride = c.shape.token_stride = 0;  // all tokens are one: the first stay
  prune(c, 2);
  for (int i = 0; i < 33; ++i) CHECK(c.index[i] == i % 11);
}

void check_many_tokens() {
  const int n = 100000, k = 1234;
  Case<BFloat16> c(2, 3, n, 5, k);
  std::vector<float> score = random_values(2 * n, 1);
  for (int i = 0; i < 2 * n; i += 3) score[i] = std::round(score[i]);
  CHECK(dvit_select_gather(&c.shape, c.x.data(), score.data(), c.kept_x.data(), c.index.data(), 2) == DVIT_OK);
  c.check_outputs(score.data());
}

// A call that is left free takes the processors that it may run on, not all that there are.
void check_affinity() {
#ifdef __linux__
  cpu_set_t allowed, one;
  CHECK(sched_getaffinity(0, sizeof(allowed), &allowed) == 0);
  CHECK(machine_threads() == CPU_COUNT(&allowed));
  int first = 0;
  while (!CPU_ISSET(first, &allowed)) ++first;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
  CHECK(machine_threads() == 1 && usual_threads() == 1);
  CHECK(sched_setaffinity(0, sizeof(allowed), &allowed) == 0);
#endif
}

}  // namespace

int main() {
  check_affinity();
  check_shapes<float>();
  check_shapes<Float16>();
  check_shapes<BFloat16>();
  check_odd_values();
  check_many_tokens();
  std::puts("prune_tokens: right in all dtypes");
}
