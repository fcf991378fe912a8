// The levels that were compiled and that this processor runs.
#include "levels.h"

namespace dvit {

namespace portable {
extern const Rows rows;
}
#ifdef DVIT_X86_LEVELS
namespace avx2 {
extern const Rows rows;
}
namespace avx512 {
extern const Rows rows;
}
#endif

std::vector<const Rows *> levels_here() {
  std::vector<const Rows *> levels = {&portable::rows};
#ifdef DVIT_X86_LEVELS  // each with what CMakeLists.txt compiles it for
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(&avx2::rows);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      levels.push_back(&avx512::rows);
  }
#endif
  return levels;
}

const Rows &best_rows() {
  static const Rows &best = *levels_here().back();
  return best;
}

}  // namespace dvit
