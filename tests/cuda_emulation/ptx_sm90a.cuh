// What csrc/cuda/ptx_sm90a.cuh has, on the CPU: takes its place in the emulated build.
#pragma once

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

#define PAGED_OPS_SM90A 1

namespace paged_ops::cuda {

inline constexpr int kWarpgroupSize = 128;

// Bits 0 to 15 of a barrier: threads that have yet to arrive; from 16 on: those of each phase; from
// 32 on: the parity of the phase.
inline void init_barrier(uint64_t& barrier, int arrivals) {
  barrier = static_cast<uint64_t>(arrivals) << 16 | static_cast<uint64_t>(arrivals);
}

inline void count_arrival_at(uint64_t& barrier) {
  if ((barrier & 0xffff) == 0) emulation::fail("arrive: no such barrier");
  const uint64_t expected = barrier >> 16 & 0xffff;
  if ((--barrier & 0xffff) == 0) barrier = (barrier ^ uint64_t{1} << 32) | expected;
  emulation::progress();
}

inline void arrive(uint64_t& barrier) {
  count_arrival_at(barrier);
  emulation::yield();  // others may go on before this thread does
}

inline void arrive_after_copies(uint64_t& barrier) {
  emulation::copies().call_after([&barrier] { count_arrival_at(barrier); });
}

inline void wait_for_phase(uint64_t& barrier, int parity) {
  while (static_cast<int>(barrier >> 32) == parity) emulation::yield();
}

inline void sync_threads(int barrier, int threads) {
  emulation::sync_threads(barrier, threads, true);
}
inline void arrive_threads(int barrier, int threads) {
  emulation::sync_threads(barrier, threads, false);
}

template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}
inline void show_to_matrix_units() {}
inline void begin_products() { emulation::products().begin(); }
inline void commit_products() { emulation::products().commit(); }
template <int kPending>
void wait_for_products() {
  emulation::products().wait(kPending);
}
template <int kParts>
void pin(float (&)[kParts][4]) {}

struct SlabMatrix {
  SharedAddress slabs;
  int slab_bytes;

  static SlabMatrix at(SharedAddress slabs, int slab_bytes) {
    if (slabs % 1024 != 0) emulation::fail("SlabMatrix: not aligned");
    return {slabs, slab_bytes};
  }
  SlabMatrix from(int bytes) const { return {slabs + bytes, slab_bytes}; }

  // Element `column`, below 64 of the slab that the matrix begins in or past it, of a row.
  template <typename Number>
  float element(Number number, int row, int column) const {
    const SharedAddress plain = slabs + column / 64 * slab_bytes + row * 128 + column % 64 * 2;
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(plain ^ (plain >> 7 & 7) << 4), 2);
    return operand(number, bits);
  }
};

// c[n][i] += a(half, k) * b(k, column) for the rows l / 4 and l / 4 + 8 of lane l.
template <int kColumns, typename A, typename B>
void multiply_16(float (*c)[4], A&& a, B&& b) {
  const int lane = threadIdx.x % 32;
  float rows[2][16];
  for (int k = 0; k < 16; ++k) {
    for (int half = 0; half < 2; ++half) rows[half][k] = a(half, k);
  }
  for (int n = 0; n < kColumns / 8; ++n) {
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 16; ++k) {
        const float factor = b(k, n * 8 + lane % 4 * 2 + i);
        for (int half = 0; half < 2; ++half) c[n][2 * half + i] += rows[half][k] * factor;
      }
    }
  }
}

template <typename Number, int kColumns>
void multiply_rows_async(float (*c)[4], SlabMatrix a, SlabMatrix b, bool add) {
  emulation::products().add(*c, kColumns / 2, [=] {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (!add) std::memset(c, 0, sizeof(float) * kColumns / 2);
    multiply_16<kColumns>(
        c, [&](int half, int k) { return a.element(Number(), warp * 16 + half * 8 + lane / 4, k); },
        [&](int k, int column) { return b.element(Number(), column, k); });
  });
}

template <typename Number, int kColumns>
void multiply_columns_async(float (*c)[4], const uint32_t (&a)[4], SlabMatrix b) {
  // What is in `a` when the product is computed counts.
  emulation::products().add(*c, kColumns / 2, [c, b, &a] {
    uint64_t low[32], high[32];
    emulation::gather(a[0] | static_cast<uint64_t>(a[1]) << 32, low);
    const int lane = emulation::gather(a[2] | static_cast<uint64_t>(a[3]) << 32, high);
    multiply_16<kColumns>(
        c,
        [&](int half, int k) {
          const uint64_t word = (k < 8 ? low : high)[lane / 4 * 4 + k % 8 / 2];
          return operand(Number(),
                         static_cast<uint32_t>(word >> (32 * half + k % 2 * 16)) & 0xffffu);
        },
        [&](int k, int column) { return b.element(Number(), k, column); });
  });
}

}  // namespace paged_ops::cuda
