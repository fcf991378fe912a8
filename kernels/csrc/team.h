// The threads of one call, together at the end of every step.
//
// Where the process has OpenMP, as under PyTorch, they are OpenMP's: those spin for milliseconds after a parallel
// region, and others would have to compete with them. Elsewhere they are started by the call and gone when it returns.
// A start costs some 20 microseconds, which callers weigh against the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>

// What GCC compiles OpenMP to, and LLVM's runtime has too. Null unless the process loaded it before this library.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
__attribute__((weak)) void GOMP_barrier();
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_max_threads();
}
#endif

namespace dvit {

inline bool has_openmp() {
#ifdef __linux__
  return GOMP_parallel && GOMP_barrier && omp_get_thread_num && omp_get_max_threads;
#else
  return false;
#endif
}

// How many processors the calling thread may run on.
inline int machine_threads() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// How many threads a call takes whose caller leaves it open.
inline int usual_threads() {
#ifdef __linux__
  if (has_openmp()) return omp_get_max_threads();
#endif
  return machine_threads();
}

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t turn = turn_;
    ++waiting_;
    if (release()) return;
    // Steps end together to within microseconds; sleeping and being woken takes tens of them.
    lock.unlock();
    for (int i = 0; i < kLooks && turn_ == turn; ++i) std::this_thread::yield();
    lock.lock();
    all_.wait(lock, [&] { return turn_ != turn; });
  }

  // From now on `count` fewer are waited for.
  void leave(int count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_ -= count;
    release();
  }

 private:
  bool release() {
    if (waiting_ < size_) return false;
    waiting_ = 0;
    ++turn_;
    all_.notify_all();
    return true;
  }

  static constexpr int kLooks = 200;
  std::mutex mutex_;
  std::condition_variable all_;
  int size_, waiting_ = 0;
  std::atomic<uint64_t> turn_{0};
};

template <class Job>
struct Step {
  int64_t parts;
  void (Job::*run)(int64_t part, int member) const;
};

// Runs every part of every step; the steps one after the other, their parts by whichever member comes free first. Where
// the system gives fewer threads than asked for, those that there are do it all. OpenMP is asked for no more than it is
// set to: its runtime would start them, and keep them.
//
// What can fail is to start a thread, and that is caught: callers are C functions, which must not throw.
template <class Job, size_t Count>
void run_steps(const Job &job, const Step<Job> (&steps)[Count], int threads) noexcept {
  std::atomic<int64_t> next[Count] = {};
  const auto work = [&](int member, const auto &wait) {
    for (size_t i = 0; i < Count; ++i) {
      const Step<Job> &step = steps[i];
      for (int64_t part; (part = next[i].fetch_add(1)) < step.parts;) (job.*step.run)(part, member);
      if (i + 1 < Count) wait();
    }
  };
#ifdef __linux__
  if (has_openmp()) threads = std::min(threads, omp_get_max_threads());
  if (has_openmp() && threads > 1) {
    auto region = [&] { work(omp_get_thread_num(), GOMP_barrier); };
    using Region = decltype(region);
    GOMP_parallel([](void *data) { (*static_cast<Region *>(data))(); }, &region, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  Barrier barrier(threads);
  const auto wait = [&] { barrier.wait(); };
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    for (int member = 1; member < threads; ++member) others.emplace_back([&, member] { work(member, wait); });
  } catch (const std::exception &) {  // no more threads, or no memory for them
    barrier.leave(threads - 1 - static_cast<int>(others.size()));
  }
  work(0, wait);
  for (std::thread &other : others) other.join();
}

}  // namespace dvit
