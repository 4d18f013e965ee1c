// How CTAs that compute parts of one result find out who is to put them together.
#pragma once

namespace paged_ops::cuda {

// True for the last of `count` callers. What all threads of their CTAs have written before a
// barrier before is there to be read after a barrier after.
__device__ inline bool last_to_arrive(unsigned* arrived, int count) {
  const auto others = static_cast<unsigned>(count - 1);
  __threadfence();
  const bool last = atomicInc(arrived, others) == others;  // which leaves it at 0
  __threadfence();
  return last;
}

}  // namespace paged_ops::cuda
