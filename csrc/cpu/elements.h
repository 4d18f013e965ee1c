// The element types as memory holds them, and their conversion from and to float, one at a time and
// without branches. Conversions round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace paged_ops::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return as_float(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t subnormal = as_bits(static_cast<float>(magnitude) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
  const uint32_t not_finite = (magnitude << 13) | 0x7f800000u;
  const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
  return as_float(sign | (magnitude < 0x7c00 ? finite : not_finite));
}

inline float to_float(Float8E4M3 x) {
  const uint32_t sign = (x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
  const uint32_t subnormal = as_bits(static_cast<float>(magnitude) * 0x1p-9f);
  const uint32_t normal = (magnitude << 20) + ((127 - 7) << 23);
  const uint32_t number = magnitude < 0x08 ? subnormal : normal;
  return as_float(sign | (magnitude < 0x7f ? number : 0x7fc00000u));
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t sign = (as_bits(x) >> 16) & 0x8000u, magnitude = as_bits(x) & 0x7fffffffu;
  // The last bit of 0.5f is 2^-24, the smallest float16: the addition rounds.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t number = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t not_finite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude < 0x47800000u ? number : not_finite))};
}

// Beyond the largest value, 448, it saturates.
template <>
inline Float8E4M3 from_float<Float8E4M3>(float x) {
  const uint32_t sign = (as_bits(x) >> 24) & 0x80u, magnitude = as_bits(x) & 0x7fffffffu;
  // The last bit of 2^14 is 2^-9, the smallest float8: the addition rounds.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0x1p14f) - as_bits(0x1p14f);
  const uint32_t normal =
      (magnitude - ((127u - 7u) << 23) + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20;
  const uint32_t number = magnitude < as_bits(0x1p-6f) ? subnormal : normal;
  const uint32_t saturated = magnitude < as_bits(448.0f) ? number : 0x7eu;
  return {static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : saturated))};
}

// Calls run with a value of the element type that `dtype` names.
template <typename Run>
void with_float_type(DType dtype, const Run& run) {
  if (dtype == DType::kFloat32) run(float{});
  if (dtype == DType::kFloat16) run(Float16{});
  if (dtype == DType::kBFloat16) run(BFloat16{});
}
template <typename Run>
void with_cache_type(DType dtype, const Run& run) {
  if (dtype == DType::kFloat8E4M3) return run(Float8E4M3{});
  with_float_type(dtype, run);
}

}  // namespace paged_ops::cpu
