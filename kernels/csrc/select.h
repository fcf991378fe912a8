// Which tokens stay: written once, for a group of threads that is a CUDA block, one host thread, or several in a test.
//
// A group has `rank` and `size`, and two calls that all its members make together:
//   count(flag)                    how many members' flags are set;
//   count_before(flag, total)      of the members of lower rank only, and of all in `total`.
#pragma once

#include "common.h"

namespace dvit {

// An integer in the order of the scores: -0.0 as 0.0, NaN below all.
DVIT_INLINE uint32_t order_key(float score) {
  const uint32_t given = bit_cast<uint32_t>(score);
  const uint32_t bits = given << 1 == 0 ? 0 : given;  // not score == 0: that may hold for denormals (DAZ)
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return score == score ? key : 0u;
}

// Writes the ascending positions of the `keep` largest of n keys to kept[0 .. keep); of equal keys the first are taken.
// key(i) must not change meanwhile. What was written is visible to the whole group after its next barrier.
template <class Group, class Key, class Size, class Index>
DVIT_INLINE void select_tokens(Group &group, const Key &key, Size n, Size keep, Index *kept) {
  // The keep-th largest key, bit by bit from the top: a bit is set if that many keys reach what it makes.
  uint32_t cut = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = cut | 1u << bit;
    Size reach = 0;
    for (Size start = 0; start < n; start += group.size) {  // all members turn equally often: count is for all
      const Size i = start + group.rank;
      reach += group.count(i < n && key(i) >= higher);
    }
    cut = reach >= keep ? higher : cut;
  }
  Size above = 0;
  for (Size start = 0; start < n; start += group.size) {
    const Size i = start + group.rank;
    above += group.count(i < n && key(i) > cut);
  }
  // Those above the cut stay, and the first of those at it, until the places are filled.
  Size placed = 0, room = keep - above;
  for (Size start = 0; start < n; start += group.size) {
    const Size i = start + group.rank;
    const bool inside = i < n;
    const uint32_t own = inside ? key(i) : 0;
    const bool level = inside && own == cut;
    int levels, stays;
    const int before = group.count_before(level, levels);
    const bool stay = inside && (own > cut || (level && before < room));
    const Size place = placed + group.count_before(stay, stays);
    if (stay) kept[place] = static_cast<Index>(i);
    room -= smaller<Size>(room, levels);
    placed += stays;
  }
}

// One thread is a group too.
struct OneThread {
  static constexpr int rank = 0, size = 1;
  int count(bool flag) const { return flag; }
  int count_before(bool flag, int &total) const {
    total = flag;
    return 0;
  }
};

}  // namespace dvit
