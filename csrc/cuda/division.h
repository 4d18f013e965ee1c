// Division by a number that only the launch knows, without a branch: the hardware has none.
#pragma once

#include <cstdint>

namespace paged_ops::cuda {

// Divides 0 .. 2^31 - 1 by a multiplication ("Division by Invariant Integers using Multiplication",
// Granlund and Montgomery, 1994): with 2^n >= value the multiplier is 2^(31 + n) / value rounded
// up, and what the rounding adds is too small to reach the next quotient.
struct Divisor {
  int32_t value;
  uint32_t multiplier;
  int32_t shift;  // 31 + n

  static Divisor of(int32_t value) {
    int32_t shift = 31;
    while (int64_t{1} << (shift - 31) < value) ++shift;
    const uint64_t power = uint64_t{1} << shift;
    return {value, static_cast<uint32_t>((power + value - 1) / value), shift};
  }

  __host__ __device__ int32_t quotient(int32_t x) const {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * multiplier >>
                                shift);
  }
  __host__ __device__ int32_t remainder(int32_t x) const { return x - quotient(x) * value; }
};

}  // namespace paged_ops::cuda
