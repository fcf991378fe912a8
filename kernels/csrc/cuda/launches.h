// The launches in their order, by whoever launches: CUDA, or a test's emulation.
#pragma once

#include "kernels.h"

namespace dvit {
inline namespace DVIT_LEVEL {

// launch(name, kernel, blocks, threads, plan) returns a dvit_status.
template <class Launch>
dvit_status launch_select(const SelectPlan &plan, const Launch &launch) {
  switch (plan.unit()) {
    case 16:
      return launch("select", select<Vector<uint32_t>>, plan.blocks(), kSelectThreads, plan);
    case 8:
      return launch("select", select<uint64_t>, plan.blocks(), kSelectThreads, plan);
    case 4:
      return launch("select", select<uint32_t>, plan.blocks(), kSelectThreads, plan);
    default:
      return launch("select", select<uint16_t>, plan.blocks(), kSelectThreads, plan);
  }
}

template <class T, class Launch>
dvit_status launch_score(const Plan<T> &plan, const Launch &launch) {
  const dvit_status status = launch("project", project<T>, plan.project_blocks(), kThreads, plan);
  return status ? status : launch("score", score<T>, plan.score_blocks(), kThreads, plan);
}

}  // namespace DVIT_LEVEL
}  // namespace dvit
