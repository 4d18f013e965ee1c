// What the matrix units take: 16 rows of queries, and keys and values out of shared memory.
//
// The rows of a fragment are queries: lane l holds parts of the rows l / 4 and l / 4 + 8. A cache
// of 16-bit elements is multiplied as it is, float8 as float16, which holds each float8 exactly.
#pragma once

#include <cstdint>
#include <type_traits>

#include "element.cuh"
#include "heuristics.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace paged_ops::cuda {

inline constexpr int kRows = 16;  // query rows of a fragment

template <typename Cache>
inline constexpr bool kIsFloat8 = std::is_same_v<Cache, __nv_fp8_e4m3>;

// What the matrix units multiply for a cache of this type.
template <typename Cache>
using Operand = std::conditional_t<kIsFloat8<Cache>, __half, Cache>;

__device__ inline uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline float2 unpack(__nv_bfloat16, uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

__device__ inline float2 unpack(__half, uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Two float8 (the low 16 bits) as two float16.
__device__ inline uint32_t widen_float8(uint32_t pair) {
  const __half2_raw wide =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return static_cast<uint32_t>(wide.x) | static_cast<uint32_t>(wide.y) << 16;
}

// Where 16 keys or values begin in shared memory, rows `pitch` bytes apart. `lane_row` is the
// lane's part of the address, the rest is known when the code is compiled.
template <typename Cache>
struct SharedRows {
  static constexpr int kChunk = 16 / sizeof(Cache);  // elements of 16 bytes

  // The elements that the instruction for one step of 16 (float8: 32) along the head reads.
  static constexpr int kStep = 2 * kChunk;

  __device__ static SharedAddress key_row(SharedAddress rows, int pitch, int lane) {
    return rows + ((lane & 7) + (lane >> 4) * 8) * pitch + ((lane >> 3) & 1) * 16;
  }
  __device__ static SharedAddress value_row(SharedAddress rows, int pitch, int lane) {
    return rows + (lane & 15) * pitch + (lane >> 4) * 16;
  }
};

// The columns of the rows that lane l holds. For 16-bit caches mma's own; for float8 permuted,
// the same way in keys and queries, and in values and sums, so that no byte moves between lanes.
template <typename Cache>
struct Columns {
  static constexpr int kPart = kIsFloat8<Cache> ? 2 : 8;  // from part 0 to part 1 of a lane

  // The first of two neighbouring columns: `part` 0 or 1 of step `step` of 16.
  __device__ static int of(int step, int part, int lane) {
    return step * 16 + part * kPart + (lane & 3) * (kIsFloat8<Cache> ? 4 : 2);
  }
};

// A query's fragments: 16 rows by 16 columns, in the order of Columns.
using RowFragment = uint32_t[4];

// scores = queries * keys^T for kKeys keys and kTiles times 16 queries; scores[t][n] holds the keys
// 8 n + 2 (l % 4) and the next, for row l / 4 and then for row l / 4 + 8. query(t, step, fragment)
// fetches the columns 16 * step and on.
template <typename Cache, int kHeadSize, int kTiles, int kKeys, int kCapacity, typename Query>
__device__ void multiply_keys(Query&& query, SharedAddress key_row, int pitch,
                              float (&scores)[kCapacity][kKeys / 8][4]) {
  using Number = Operand<Cache>;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kHeadSize / SharedRows<Cache>::kStep; ++step) {
    constexpr int kParts = SharedRows<Cache>::kStep / 16;
    RowFragment rows[kTiles][kParts];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) query(tile, kParts * step + part, rows[tile][part]);
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t key[4];
      load_matrices(key_row + n * 8 * pitch + step * 32, key);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        auto* const sums = scores[tile];
        if constexpr (kIsFloat8<Cache>) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const auto& query_part = rows[tile][part];
            const uint32_t low = key[part], high = key[2 + part];
            multiply_add(Number(), sums[n], query_part, widen_float8(low), widen_float8(low >> 16));
            multiply_add(Number(), sums[n + 1], query_part, widen_float8(high),
                         widen_float8(high >> 16));
          }
        } else {
          multiply_add(Number(), sums[n], rows[tile][0], key[0], key[1]);
          multiply_add(Number(), sums[n + 1], rows[tile][0], key[2], key[3]);
        }
      }
    }
  }
}

// sums += weights * values, the weights laid out as multiply_keys leaves scores.
template <typename Cache, int kHeadSize, int kTiles, int kKeys, int kCapacity>
__device__ void multiply_values(const float (&weights)[kCapacity][kKeys / 8][4],
                                SharedAddress value_row, int pitch,
                                float (&sums)[kCapacity][kHeadSize / 8][4]) {
  using Number = Operand<Cache>;
#pragma unroll
  for (int n = 0; n < kKeys / 8; n += 2) {
    RowFragment rows[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto &first = weights[tile][n], &second = weights[tile][n + 1];
      rows[tile][0] = pack(Number(), first[0], first[1]);
      rows[tile][1] = pack(Number(), first[2], first[3]);
      rows[tile][2] = pack(Number(), second[0], second[1]);
      rows[tile][3] = pack(Number(), second[2], second[3]);
    }
#pragma unroll
    for (int step = 0; step < kHeadSize / SharedRows<Cache>::kStep; ++step) {
      uint32_t value[4];
      load_matrices_transposed(value_row + n * 8 * pitch + step * 32, value);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (kIsFloat8<Cache>) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t low = value[2 * half], high = value[2 * half + 1];
            auto* const sum = &sums[tile][4 * step + 2 * half];
            multiply_add(Number(), sum[0], rows[tile], widen_float8(__byte_perm(low, 0, 0x4420)),
                         widen_float8(__byte_perm(high, 0, 0x4420)));
            multiply_add(Number(), sum[1], rows[tile], widen_float8(__byte_perm(low, 0, 0x4431)),
                         widen_float8(__byte_perm(high, 0, 0x4431)));
          }
        } else {
          multiply_add(Number(), sums[tile][2 * step], rows[tile], value[0], value[1]);
          multiply_add(Number(), sums[tile][2 * step + 1], rows[tile], value[2], value[3]);
        }
      }
    }
  }
}

// Calls run(column, first, second) for each two neighbouring columns of one of the lane's rows.
template <typename Cache, int kHeadSize, typename Run>
__device__ void for_each_pair(const float (&sums)[kHeadSize / 8][4], int half, int lane,
                              Run&& run) {
#pragma unroll
  for (int step = 0; step < kHeadSize / 16; ++step) {
    const auto &even = sums[2 * step], &odd = sums[2 * step + 1];
    if constexpr (kIsFloat8<Cache>) {
      run(Columns<Cache>::of(step, 0, lane), even[2 * half], odd[2 * half]);
      run(Columns<Cache>::of(step, 1, lane), even[2 * half + 1], odd[2 * half + 1]);
    } else {
      run(Columns<Cache>::of(step, 0, lane), even[2 * half], even[2 * half + 1]);
      run(Columns<Cache>::of(step, 1, lane), odd[2 * half], odd[2 * half + 1]);
    }
  }
}

}  // namespace paged_ops::cuda
