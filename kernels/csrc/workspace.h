// A caller's workspace, cut into parts: once with a null base to learn its size, once to use it.
#pragma once

#include "common.h"

namespace dvit {

class Workspace {
 public:
  explicit Workspace(void *base) : base_(round_up<uintptr_t>(reinterpret_cast<uintptr_t>(base), kAlignment)) {}

  template <class T>
  T *take(int64_t count) {
    T *part = reinterpret_cast<T *>(base_ + used_);
    used_ += round_up<size_t>(count * sizeof(T), kAlignment);
    return part;
  }

  // Bytes that make room for all parts wherever the workspace begins.
  size_t bytes() const { return used_ + kAlignment - 1; }

 private:
  static constexpr size_t kAlignment = 256;
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace dvit
