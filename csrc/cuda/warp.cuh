// What the lanes of a warp do together.
#pragma once

namespace paged_ops::cuda {

inline constexpr int kWarpSize = 32;

// The sum over the lanes, to the bit the same in every lane: each step adds the same two numbers.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

}  // namespace paged_ops::cuda
