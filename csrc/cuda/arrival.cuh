// How CTAs that compute parts of one result find out who is to put them together.
#pragma once

#include "ptx.cuh"

namespace paged_ops::cuda {

// True for the last of `count` callers. What all threads of their CTAs have written before a
// barrier before is there to be read after a barrier after.
__device__ inline bool last_to_arrive(unsigned* arrived, int count) {
  const auto others = static_cast<unsigned>(count - 1);
  return count_arrival(arrived, others) == others;  // which leaves it at 0
}

}  // namespace paged_ops::cuda
