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

// The power of two at or below x, of 0 and of what is not a number that of 1.
__device__ inline int exponent_of(float x) {
  return x >= 0x1p-100f && x <= 0x1p+127f ? ilogbf(x) : 0;
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

// What multiplies a RowFragment: 16 elements of each of 8 keys, or 8 elements of each of 16 values.
struct KeyFragment {
  uint32_t low;
  uint32_t high;
};

// Of what load_matrices has given for 16 keys: keys 8 * half and on, columns 16 * part and on.
template <typename Cache>
__device__ KeyFragment key_fragment(const uint32_t (&key)[4], int part, int half) {
  if constexpr (kIsFloat8<Cache>) {
    const uint32_t elements = key[2 * half + part];
    return {widen_float8(elements), widen_float8(elements >> 16)};
  } else {
    return {key[2 * half], key[2 * half + 1]};
  }
}

// Of what load_matrices_transposed has given for 16 values: the `column`-th 8 columns.
template <typename Cache>
__device__ KeyFragment value_fragment(const uint32_t (&value)[4], int column) {
  const uint32_t low = value[column / 2 * 2], high = value[column / 2 * 2 + 1];
  if constexpr (kIsFloat8<Cache>) {
    const uint32_t bytes = column % 2 == 0 ? 0x4420 : 0x4431;
    return {widen_float8(__byte_perm(low, 0, bytes)), widen_float8(__byte_perm(high, 0, bytes))};
  } else {
    return {value[2 * column], value[2 * column + 1]};
  }
}

// scores = queries * keys^T for kKeys keys and kTiles times 16 queries; scores[t][n] holds the keys
// 8 n + 2 (l % 4) and the next, for row l / 4 and then for row l / 4 + 8. query(t, step, fragment)
// fetches the columns 16 * step and on.
template <typename Cache, int kHeadSize, int kTiles, int kKeys, typename Query>
__device__ void multiply_keys(Query&& query, SharedAddress key_row, int pitch,
                              float (&scores)[kTiles][kKeys / 8][4]) {
  using Number = Operand<Cache>;
  constexpr int kParts = SharedRows<Cache>::kStep / 16;
  constexpr int kSteps = kHeadSize / SharedRows<Cache>::kStep, kLoads = kKeys / 16;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][n][i] = 0.0f;
    }
  }
  // Fragments are loaded one ahead; those of float8 are as large as two, there is no room for more.
  constexpr int kAhead = kIsFloat8<Cache> ? 0 : 1;
  RowFragment rows[1 + kAhead][kTiles][kParts];
  uint32_t key[1 + kAhead][4];
  const auto load_rows = [&](int step) {
    if (step >= kSteps) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        query(tile, kParts * step + part, rows[step % (1 + kAhead)][tile][part]);
      }
    }
  };
  const auto load_key = [&](int load) {
    if (load >= kSteps * kLoads) return;
    load_matrices(key_row + load % kLoads * 16 * pitch + load / kLoads * 32,
                  key[load % (1 + kAhead)]);
  };
  if (kAhead > 0) {
    load_rows(0);
    load_key(0);
  }
#pragma unroll
  for (int load = 0; load < kSteps * kLoads; ++load) {
    const int step = load / kLoads, n = load % kLoads;
    load_key(load + kAhead);
    if (n == 0) load_rows(step + kAhead);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyFragment keys = key_fragment<Cache>(key[load % (1 + kAhead)], part, half);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add(Number(), scores[tile][2 * n + half], rows[step % (1 + kAhead)][tile][part],
                       keys.low, keys.high);
        }
      }
    }
  }
}

// sums += weights * values. weight(t, n, fragment) makes the weights of the keys 16 n and on, laid
// out as multiply_keys leaves scores; it is asked for them while those before are multiplied.
template <typename Cache, int kHeadSize, int kTiles, int kKeys, typename Weight>
__device__ void multiply_values(Weight&& weight, SharedAddress value_row, int pitch,
                                float (&sums)[kTiles][kHeadSize / 8][4]) {
  using Number = Operand<Cache>;
  constexpr int kSteps = kHeadSize / SharedRows<Cache>::kStep;
  constexpr int kParts = SharedRows<Cache>::kStep / 8;  // of 8 columns, in a step
  RowFragment rows[2][kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) weight(tile, 0, rows[0][tile]);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t value[4];
      load_matrices_transposed(value_row + n * 16 * pitch + step * 32, value);
#pragma unroll
      for (int column = 0; column < kParts; ++column) {
        const KeyFragment values = value_fragment<Cache>(value, column);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add(Number(), sums[tile][kParts * step + column], rows[n % 2][tile], values.low,
                       values.high);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool due = step == tile * kSteps / kTiles && n + 1 < kKeys / 16;
        if (due) weight(tile, n + 1, rows[(n + 1) % 2][tile]);
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
