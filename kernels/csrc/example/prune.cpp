// A host of the library: random tokens and a random predictor in, what was kept out.
//
//     c++ prune.cpp -ldvit_kernels && ./a.out
#include <dvit_kernels.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using Values = std::vector<float>;

// Turns a status into an exception with the library's message.
void check(dvit_status status) {
  if (status == DVIT_OK) return;
  throw std::runtime_error(std::string(dvit_status_string(status)) + ": " + dvit_last_error());
}

Values random_values(int64_t count, double scale) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(scale));
  Values values(count);
  for (float &value : values) value = normal(generator);
  return values;
}

Values row_sums(const Values &matrix, int64_t columns) {
  Values sums(matrix.size() / columns);
  for (size_t i = 0; i < matrix.size(); ++i) sums[i / columns] += matrix[i];
  return sums;
}

int main() try {
  // DeiT-S, first stage: a class token and 196 patches of 384 channels, of which 137 stay.
  const int64_t batch = 2, prefix = 1, tokens = 196, c = 384, keep = 137;
  const dvit_tokens shape = {DVIT_FLOAT32, batch, prefix, tokens, c, keep, (prefix + tokens) * c, c};

  const Values x = random_values(batch * (prefix + tokens) * c, 1.0);
  const Values w1 = random_values(c * c, 1 / std::sqrt(c)), w1_sum = row_sums(w1, c), b1(c);
  const Values w2_own = random_values(c / 2 * c / 2, 1 / std::sqrt(c)), b2(c / 2);
  const Values w2_mean = random_values(c / 2 * c / 2, 1 / std::sqrt(c));
  const Values w3 = random_values(c / 4 * c / 2, 1 / std::sqrt(c / 2)), b3(c / 4);
  const Values w4 = random_values(c / 4, 1 / std::sqrt(c / 4)), b4(1);
  const dvit_predictor predictor = {w1.data(), w1_sum.data(), b1.data(), w2_own.data(), w2_mean.data(),
                                    b2.data(), w3.data(),     b3.data(), w4.data(),     b4.data()};

  const int threads = 0;  // as many as there are
  size_t bytes = 0;
  check(dvit_prune_tokens_workspace(&shape, threads, &bytes));
  std::vector<char> workspace(bytes);
  Values kept_x(batch * (prefix + keep) * c);
  std::vector<int64_t> index(batch * keep);
  check(dvit_prune_tokens(&shape, &predictor, 1e-5f, x.data(), kept_x.data(), index.data(), workspace.data(),
                          workspace.size(), threads));

  std::printf("libdvit_kernels %s, %s CUDA\n", dvit_version(), dvit_has_cuda() ? "with" : "without");
  for (int64_t image = 0; image < batch; ++image) {
    std::printf("picture %lld keeps %lld of %lld patches:", static_cast<long long>(image), static_cast<long long>(keep),
                static_cast<long long>(tokens));
    for (int64_t i = 0; i < 10; ++i) std::printf(" %lld", static_cast<long long>(index[image * keep + i]));
    std::puts(" ...");
  }
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
