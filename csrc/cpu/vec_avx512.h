// The primitives (vec_scalar.h says what they mean) for AVX-512 F, BW, VL and DQ.
#include "elements.h"

namespace paged_ops::cpu {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kBlockRows = 4, kBlockColumns = 4;
constexpr int kDotRows = 2, kDotKeys = 8;

inline __mmask16 first_lanes(int count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }

inline Vec load(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Vec load(const Float16* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline Vec load(const BFloat16* p, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Float8E4M3* p, int count) {
  // As the float16 with the same exponent field, which is 2^-8 of the value; 0x7f is NaN.
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(first_lanes(count), p));
  const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(bytes, magnitude), 8);
  const __m256i number = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_mask_mov_epi16(number, nan, _mm256_set1_epi16(0x7e00));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

inline void store(float* p, Vec x, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
inline void store(Float16* p, Vec x, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count),
                           _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* p, Vec x, int count) {
  const __m512i bits = _mm512_castps_si512(x), truncated = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(truncated, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i nan = _mm512_or_si512(truncated, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm512_mask_cvtepi32_storeu_epi16(p, first_lanes(count),
                                    _mm512_mask_mov_epi32(rounded, is_nan, nan));
}
template <typename T>
inline void store(T* p, Vec x, int count) {
  alignas(64) float lanes[kLanes];
  alignas(64) T converted[kLanes];
  _mm512_store_ps(lanes, x);
  for (int i = 0; i < kLanes; ++i) converted[i] = from_float<T>(lanes[i]);
  std::memcpy(p, converted, sizeof(T) * (count < kLanes ? count : kLanes));
}

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec x) { return _mm512_abs_ps(x); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  const Vec mask = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(mask, magnitude), _mm512_and_ps(mask, sign));
}

inline Vec select(int begin, int end, Vec a, Vec b) {
  const __mmask16 inside = first_lanes(end) & ~first_lanes(begin);
  return _mm512_mask_blend_ps(inside, b, a);
}
inline Vec select_less(Vec x, Vec bound, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), b, a);
}

inline Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
constexpr float kLeastExponent = -200;
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }

// Both add neighbours, the first pairs of lanes, the second quarters of a vector.
inline Vec add_pairs(Vec a, Vec b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
inline Vec add_quarters(Vec a, Vec b) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
inline Vec sum_lanes(const Vec (&rows)[kLanes]) {
  Vec pairs[8], quads[4];
  for (int i = 0; i < 8; ++i) {
    const Vec a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) quads[i] = add_pairs(pairs[2 * i], pairs[2 * i + 1]);
  return add_quarters(add_quarters(quads[0], quads[1]), add_quarters(quads[2], quads[3]));
}

// 1x1 blocks to 2x2 to 4x4, inside each quarter of a vector, then the quarters themselves.
inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes], quads[kLanes], halves[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  const auto join = [](Vec a, Vec b, auto high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  for (int i = 0; i < kLanes; i += 4) {
    quads[i] = join(pairs[i], pairs[i + 2], false);
    quads[i + 1] = join(pairs[i], pairs[i + 2], true);
    quads[i + 2] = join(pairs[i + 1], pairs[i + 3], false);
    quads[i + 3] = join(pairs[i + 1], pairs[i + 3], true);
  }
  for (int i = 0; i < 4; ++i) {
    halves[i] = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    halves[i + 4] = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    halves[i + 8] = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    halves[i + 12] = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(halves[i], halves[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(halves[i], halves[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(halves[i + 4], halves[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(halves[i + 4], halves[i + 12], 0xdd);
  }
}

}  // namespace
}  // namespace paged_ops::cpu
