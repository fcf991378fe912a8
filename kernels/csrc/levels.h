// The levels of the processor that rows.cpp was compiled for.
#pragma once

#include <vector>

#include "rows.h"

namespace dvit {

// Those that this processor runs, the best last.
std::vector<const Rows *> levels_here();

const Rows &best_rows();

}  // namespace dvit
