// The levels of the processor that rows.cpp was compiled for.
#pragma once

#include <array>

#include "rows.h"

namespace dvit {

// A list of levels that allocates nothing: C functions, which must not throw, make one.
class Levels {
 public:
  void add(const Rows &rows) { levels_[count_++] = &rows; }
  const Rows *const *begin() const { return levels_.data(); }
  const Rows *const *end() const { return levels_.data() + count_; }

 private:
  std::array<const Rows *, 3> levels_ = {};
  size_t count_ = 0;
};

// Those that this processor runs, the best last.
Levels levels_here() noexcept;

const Rows &best_rows() noexcept;

}  // namespace dvit
