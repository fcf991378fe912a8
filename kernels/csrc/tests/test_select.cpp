// Selection against a stable sort: by one thread, and by several at once, as a CUDA block does it.
#include <cstdint>

#include "../select.h"
#include "../team.h"
#include "check.h"

namespace {

using dvit::select_tokens;

// Threads of the host as a group: races in the code that a CUDA block runs are there for ThreadSanitizer to see.
struct Threads {
  const int rank, size;
  dvit::Barrier &barrier;
  std::vector<int> &flags;

  int count_before(bool flag, int &total) {
    flags[rank] = flag;
    barrier.wait();
    int before = 0;
    total = 0;
    for (int i = 0; i < size; ++i) {
      before += i < rank ? flags[i] : 0;
      total += flags[i];
    }
    barrier.wait();
    return before;
  }
  int count(bool flag) {
    int total;
    count_before(flag, total);
    return total;
  }
};

std::vector<int> by_sorting(const std::vector<float> &scores, int keep) {
  std::vector<int> order(scores.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return std::isnan(scores[b]) ? !std::isnan(scores[a]) : scores[a] > scores[b];
  });
  order.resize(keep);
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<int> by_one(const std::vector<float> &scores, int keep) {
  std::vector<int> kept(keep, -1);
  dvit::OneThread alone;
  select_tokens(
      alone, [&](int i) { return dvit::order_key(scores[i]); }, static_cast<int>(scores.size()), keep, kept.data());
  return kept;
}

std::vector<int> by_threads(const std::vector<float> &scores, int keep, int size) {
  std::vector<int> kept(keep, -1), flags(size);
  dvit::Barrier barrier(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      Threads group{rank, size, barrier, flags};
      select_tokens(
          group, [&](int i) { return dvit::order_key(scores[i]); }, static_cast<int>(scores.size()), keep, kept.data());
    });
  for (std::thread &thread : threads) thread.join();
  return kept;
}

std::vector<std::vector<float>> rows_of(int n) {
  const float odd[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, -NAN, 1e-45f, -1e-45f};
  std::mt19937 generator(n);
  std::vector<std::vector<float>> rows = {dvit::random_values(n, n), std::vector<float>(n, NAN),
                                          std::vector<float>(n, -INFINITY), std::vector<float>(n, -0.0f)};
  for (int i = 0; i < n; i += 2) rows.back()[i] = 0.0f;
  std::vector<float> odds(n), few(n);
  for (int i = 0; i < n; ++i) {
    odds[i] = odd[generator() % 10];
    few[i] = static_cast<float>(generator() % 5) - 2;
  }
  rows.push_back(odds);
  rows.push_back(few);
  return rows;
}

}  // namespace

int main() {
  for (int n = 1; n <= 1024; ++n)
    for (const std::vector<float> &scores : rows_of(n)) {
      for (int keep = 1; keep <= n; keep += n <= 40 ? 1 : n - 1 > keep ? std::max(1, (n - keep) / 2) : 1)
        CHECK(by_one(scores, keep) == by_sorting(scores, keep));
      CHECK(by_one(scores, n) == by_sorting(scores, n));
    }
  for (const int n : {1, 2, 5, 31, 67})
    for (const std::vector<float> &scores : rows_of(n))
      for (const int size : {2, 3, 8})
        for (const int keep : {1, (n + 1) / 2, n}) CHECK(by_threads(scores, keep, size) == by_sorting(scores, keep));
  std::puts("selection: as a stable sort for N from 1 to 1024");
}
