// The levels that were compiled and that this processor runs.
#include "levels.h"

namespace dvit {

inline namespace DVIT_LEVEL {  // portable, as everywhere but in rows.cpp
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

Levels levels_here() noexcept {
  Levels levels;
  levels.add(portable::rows);
#ifdef DVIT_X86_LEVELS  // each with what CMakeLists.txt compiles it for
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.add(avx2::rows);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      levels.add(avx512::rows);
  }
#endif
  return levels;
}

const Rows &best_rows() noexcept {
  static const Levels levels = levels_here();
  return *levels.end()[-1];
}

}  // namespace dvit
