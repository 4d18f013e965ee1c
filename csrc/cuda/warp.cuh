// What the lanes of a warp do together.
#pragma once

#include <cstdint>

namespace paged_ops::cuda {

inline constexpr int kWarpSize = 32;

// a / b for 0 <= a and 0 < b in fewer instructions than an exact division: the estimate is at most
// one off, as long as the quotient is below kMostQuotient.
inline constexpr int64_t kMostQuotient = 1 << 22;
__device__ inline int quotient(int a, int b) {
  const int estimate = static_cast<int>(__fdividef(static_cast<float>(a), static_cast<float>(b)));
  const int rest = a - estimate * b;
  return rest < 0 ? estimate - 1 : rest >= b ? estimate + 1 : estimate;
}

// The sum over the lanes, to the bit the same in every lane: each step adds the same two numbers.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// The sum and the maximum over the 4 lanes l / 4 * 4 and on, which share the rows of a fragment.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The same over the 8 lanes of equal l % 4, which share the columns of a fragment.
__device__ inline float column_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

__device__ inline float column_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 4));
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 8));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 16));
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

__device__ inline float warp_broadcast(float x, int from) {
  return __shfl_sync(0xffffffffu, x, from);
}

// The sum over the lanes before this one.
__device__ inline uint32_t warp_exclusive_sum(uint32_t x, int lane) {
  uint32_t sum = x;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - x;
}

__device__ inline bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

__device__ inline int warp_count(bool x) { return __popc(__ballot_sync(0xffffffffu, x)); }

// The first lane with a true x; lane 0 if none has.
__device__ inline int warp_first(bool x) {
  return max(__ffs(static_cast<int>(__ballot_sync(0xffffffffu, x))) - 1, 0);
}

}  // namespace paged_ops::cuda
