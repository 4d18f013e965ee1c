// AVX-512 with the bfloat16 dot product, two elements a lane: a bfloat16 cache is multiplied as it
// is, and a float8 cache as the bfloat16 that have the same values.
#include "vec_avx512.h"

namespace paged_ops::cpu {
namespace {

// Bits of the values k * 2^-9 for k = 0..7, which float8 holds as subnormals; NaN last.
alignas(64) constexpr uint16_t kNotNormal[32] = {
    0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0,      0,      0,      0,      0,      0,      0,      0, 0, 0, 0, 0, 0, 0, 0x7fc0};

inline __m512i to_bfloat16(__m256i float8) {
  const __m512i extended = _mm512_cvtepi8_epi16(float8);
  const __m512i magnitude =
      _mm512_and_si512(_mm512_slli_epi16(extended, 4), _mm512_set1_epi16(0x7f0));
  // Exponents count from -127 instead of -7.
  const __m512i normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16((127 - 7) << 7));
  // Below 0x08 a float8 is subnormal, 0x7f is NaN: both lie above the others once 0x08 is taken
  // off. The five bits that choose from the table tell them apart.
  const __mmask32 not_normal = _mm512_cmpgt_epu16_mask(
      _mm512_sub_epi16(magnitude, _mm512_set1_epi16(0x080)), _mm512_set1_epi16(0x7e0 - 0x080));
  const __m512i value =
      _mm512_mask_permutexvar_epi16(normal, not_normal, extended, _mm512_load_si512(kNotNormal));
  constexpr int kOrAnd = 0xf8;  // value | (extended & sign)
  return _mm512_ternarylogic_epi32(value, extended, _mm512_set1_epi16(-0x8000), kOrAnd);
}

struct BFloat16Math {
  using Element = BFloat16;
  static constexpr int kDepth = 2;
  static constexpr int kColumns = 2 * kLanes;
  static constexpr int kHeadMultiple = 2;
  static constexpr int kRowMultiple = 1;
  static constexpr int kKeyMultiple = kLanes;
  static constexpr int kFewRows = 2 * kBlockRows;
  static constexpr int kLeastRows = 0;
  using OfFewerRows = BFloat16Math;
  using Tiles = NoTiles;

  static Vec broadcast_word(const BFloat16* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_castsi512_ps(_mm512_set1_epi32(word));
  }
  static Vec multiply_add_words(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  template <typename T>
  static Vec load_words(const T* p, int count) {
    return _mm512_castsi512_ps(load_elements(p, count));
  }
  static void store_weights(BFloat16* p, Vec x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &rounded, sizeof rounded);
  }

  // Words of the same columns of two rows.
  template <typename T, int kCount>
  static void load_values(const T* const* rows, int first, int head_size, Vec (&row)[kCount]) {
    // Word i of the indices takes column i of the even row and, counted from 32, of the odd one.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i odd_lane = _mm512_add_epi32(lane, _mm512_set1_epi32(32));
    const __m512i low = _mm512_or_si512(lane, _mm512_slli_epi32(odd_lane, 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < kCount; i += 2) {
      const int column = first + i * kLanes;
      const __m512i even = load_elements(rows[0] + column, head_size - column);
      const __m512i odd = load_elements(rows[1] + column, head_size - column);
      row[i] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, low, odd));
      if (i + 1 == kCount) break;
      row[i + 1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, high, odd));
    }
  }

 private:
  static __mmask32 first_elements(int count) { return count >= kColumns ? ~0u : (1u << count) - 1; }
  static __m512i load_elements(const BFloat16* p, int count) {
    return _mm512_maskz_loadu_epi16(first_elements(count), p);
  }
  static __m512i load_elements(const Float8E4M3* p, int count) {
    return to_bfloat16(_mm256_maskz_loadu_epi8(first_elements(count), p));
  }
};

}  // namespace
}  // namespace paged_ops::cpu
