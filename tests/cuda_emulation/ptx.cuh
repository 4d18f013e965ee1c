// What csrc/cuda/ptx.cuh has, on the CPU: takes its place in the emulated build.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace paged_ops::cuda {

inline void wait_for_previous_kernel() { emulation::waited = true; }
inline void let_next_kernel_start() {}
template <typename Word>
Word load_fresh(const Word* from) {
  return *from;
}

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) {
  return reinterpret_cast<SharedAddress>(pointer);
}

inline unsigned char* dynamic_shared_memory() { return emulation::dynamic_shared_memory(); }

inline void copy_async_16(SharedAddress to, const void* from, bool present) {
  if (to % 16 != 0) emulation::fail("copy_async_16: not aligned");
  if (present && reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    emulation::fail("copy_async_16: not aligned");
  }
  emulation::copies().copy(reinterpret_cast<void*>(to), present ? from : nullptr);
}
using CachePolicy = uint64_t;
inline CachePolicy evict_first() { return 0; }
inline void copy_async_16(SharedAddress to, const void* from, bool present, CachePolicy) {
  copy_async_16(to, from, present);
}
inline void commit_copies() { emulation::copies().commit(); }
template <int kPending>
void wait_for_copies() {
  emulation::copies().wait(kPending);
}

inline unsigned count_arrival(unsigned* counter, unsigned most) {
  const unsigned before = *counter;
  *counter = before >= most ? 0 : before + 1;
  return before;
}

inline unsigned draw_number(unsigned* counter, unsigned most) {
  return count_arrival(counter, most);
}

// Element `column` of row `row` of matrix `matrix`, by the addresses that the lanes have given.
inline uint16_t matrix_element(const uint64_t* rows, int matrix, int row, int column) {
  uint16_t element;
  std::memcpy(&element, reinterpret_cast<const char*>(rows[matrix * 8 + row]) + column * 2, 2);
  return element;
}

inline void load_matrices(SharedAddress row, uint32_t (&to)[4]) {
  uint64_t rows[32];
  const int lane = emulation::gather(row, rows);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](int i) {
      return static_cast<uint32_t>(matrix_element(rows, matrix, lane / 4, lane % 4 * 2 + i));
    };
    to[matrix] = at(0) | at(1) << 16;
  }
}

inline void load_matrices_transposed(SharedAddress row, uint32_t (&to)[4]) {
  uint64_t rows[32];
  const int lane = emulation::gather(row, rows);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](int i) {
      return static_cast<uint32_t>(matrix_element(rows, matrix, lane % 4 * 2 + i, lane / 4));
    };
    to[matrix] = at(0) | at(1) << 16;
  }
}

inline uint32_t transpose_matrix(uint32_t row) {
  uint64_t rows[32];
  const int lane = emulation::gather(row, rows);
  const auto at = [&](int i) {
    const uint64_t word = rows[(lane % 4 * 2 + i) * 4 + lane / 4 / 2];
    return static_cast<uint32_t>(word >> (16 * (lane / 4 % 2))) & 0xffffu;
  };
  return at(0) | at(1) << 16;
}

inline float operand(__nv_bfloat16, uint32_t bits) {
  const uint32_t wide = bits << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline float operand(__half, uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(bits);
  return __half2float(__half(raw));
}

template <typename Number>
void multiply_add(Number number, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t a_low[32], a_high[32], b[32];
  emulation::gather(a[0] | static_cast<uint64_t>(a[1]) << 32, a_low);
  emulation::gather(a[2] | static_cast<uint64_t>(a[3]) << 32, a_high);
  const int lane = emulation::gather(b0 | static_cast<uint64_t>(b1) << 32, b);
  // Lane r % 8 * 4 + k % 8 / 2 holds element (r, k) of a, and n * 4 + k % 8 / 2 element (k, n) of
  // b.
  const auto half = [](uint64_t word, int index) {
    return static_cast<uint32_t>(word >> (16 * index)) & 0xffffu;
  };
  for (int k = 0; k < 16; ++k) {
    const uint64_t* const a_words = (k < 8 ? a_low : a_high) + lane / 4 * 4 + k % 8 / 2;
    const uint64_t* const b_words = b + lane % 4 * 8 + k % 8 / 2;
    float x[2], y[2];
    for (int i = 0; i < 2; ++i) {
      x[i] = operand(number, half(*a_words, i * 2 + k % 2));
      y[i] = operand(number, half(b_words[i * 4], k / 8 * 2 + k % 2));
    }
    for (int i = 0; i < 4; ++i) c[i] += x[i / 2] * y[i % 2];
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace paged_ops::cuda
