// The primitives in plain C++, for any machine, and what each of them means. The loops are short
// and of fixed length: the compiler turns them into whatever vectors its target has.
#include <cmath>

#include "elements.h"

namespace paged_ops::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kBlockRows = 4,
              kBlockColumns = 1;           // accumulators that fit the registers: see multiply
constexpr int kDotRows = 2, kDotKeys = 2;  // likewise: see dot_keys

struct Vec {
  float lane[kLanes];
};

template <typename Function>
inline Vec map(Function function) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = function(i);
  return result;
}

inline Vec broadcast(float x) {
  return map([&](int) { return x; });
}
inline Vec zero() { return broadcast(0.0f); }
inline Vec iota() {
  return map([](int i) { return static_cast<float>(i); });
}

inline Vec load(const float* p) {
  return map([&](int i) { return p[i]; });
}
inline void store(float* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
}

// `count` elements, or kLanes if that is less, converted to float; the other lanes are 0 and their
// memory is not touched.
template <typename T>
inline Vec load(const T* p, int count) {
  if (count >= kLanes) return map([&](int i) { return to_float(p[i]); });
  return map([&](int i) { return i < count ? to_float(p[i]) : 0.0f; });
}
template <typename T>
inline void store(T* p, Vec x, int count) {
  for (int i = 0; i < kLanes && i < count; ++i) p[i] = from_float<T>(x.lane[i]);
}

inline Vec add(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {  // a * b + c
  return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec max(Vec a, Vec b) {  // b where either is NaN
  return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec abs(Vec x) {
  return map([&](int i) { return std::fabs(x.lane[i]); });
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return map([&](int i) { return std::copysign(magnitude.lane[i], sign.lane[i]); });
}

// Lanes begin <= i < end of a, the others of b.
inline Vec select(int begin, int end, Vec a, Vec b) {
  return map([&](int i) { return begin <= i && i < end ? a.lane[i] : b.lane[i]; });
}
inline Vec select_less(Vec x, Vec bound, Vec a, Vec b) {  // x < bound ? a : b
  return map([&](int i) { return x.lane[i] < bound.lane[i] ? a.lane[i] : b.lane[i]; });
}

// |x| < 2^22, to the nearest integer: below 1.5 * 2^23 the last bit of a float is 1.
constexpr float kRoundingShift = 12582912.0f;
inline Vec round(Vec x) {
  return map([&](int i) { return (x.lane[i] + kRoundingShift) - kRoundingShift; });
}
// x * 2^n for 1/2 < x < 2 and integers n from kLeastExponent, where the result is 0, to 127.
constexpr float kLeastExponent = -127;
inline Vec times_power_of_two(Vec x, Vec n) {
  return map([&](int i) {
    return x.lane[i] * as_float((as_bits(n.lane[i] + kRoundingShift) + 127) << 23);
  });
}

inline float reduce_add(Vec x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
  }
  return x.lane[0];
}
inline float reduce_max(Vec x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      x.lane[i] = x.lane[i] > x.lane[i + half] ? x.lane[i] : x.lane[i + half];
    }
  }
  return x.lane[0];
}

// Lane i is the sum over the lanes of rows[i].
inline Vec sum_lanes(const Vec (&rows)[kLanes]) {
  return map([&](int i) { return reduce_add(rows[i]); });
}

// rows[i].lane[j] <-> rows[j].lane[i]
inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i].lane[j];
      rows[i].lane[j] = rows[j].lane[i];
      rows[j].lane[i] = swapped;
    }
  }
}

}  // namespace
}  // namespace paged_ops::cpu
