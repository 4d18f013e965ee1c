// The matrix units with keys as rows and queries as columns: an instruction takes 16 keys and 8
// queries. Decoding has few queries per KV head, and the other way round half of 16 rows or more
// would be empty: twice the instructions, and twice the registers for the sums.
//
// Lane l holds the queries 2 * (l % 4) and the next of each tile of 8, together with the 7 other
// lanes of the same l % 4, which have other keys and other columns of the values.
#pragma once

#include <cstdint>

#include "fragments.cuh"
#include "scores.cuh"

namespace paged_ops::cuda {

inline constexpr int kColumns = 8;  // queries of a tile

// Where 16 bytes of a row of keys or values lie in shared memory: some of a row's chunks of 16
// bytes change places, so that the eight rows that ldmatrix reads lie in different banks. Rows that
// are padded for that instead are written across lines, and memory is read 5 % slower.
template <int kChunks>
struct Swizzle {
  // So many neighbouring chunks change places: the largest power of two up to 8 that divides.
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  // Chunk c of a row lies where chunk c ^ of(row) would. of(a + b) = of(a) ^ of(b) where a and b
  // have no bit in common.
  __host__ __device__ static constexpr int of(int row) { return row / (8 / kGroup) % kGroup; }

  // The address of chunk `first` (less than kGroup) of a row.
  __device__ static SharedAddress row(SharedAddress rows, int row, int first) {
    return rows + row * kChunks * 16 + (first ^ of(row)) * 16;
  }
  // From there to the chunk that is `ahead`, an even number of chunks.
  __device__ static SharedAddress ahead(SharedAddress address, int ahead) {
    return (address ^ static_cast<SharedAddress>(ahead % kGroup * 16)) +
           ahead / kGroup * kGroup * 16;
  }
};

// 16 columns of a head of 8 queries: of query l / 4, what Columns<Cache>::of says.
using QueryFragment = uint32_t[2];

// The query of a tile that a lane's i-th number belongs to.
__device__ inline int query_of(int lane, int i) { return (lane & 3) * 2 + i; }

// The key, of 16, that a lane's `half` belongs to.
__device__ inline int key_of(int lane, int half) { return half * 8 + lane / 4; }

// scores = keys * queries for kKeys keys: scores[t][m][2 * half + i] is of key 16 m + key_of(half)
// and query 8 t + query_of(i). `keys`: where they begin in shared memory.
template <typename Cache, int kHeadSize, int kKeys, int kTiles>
__device__ void multiply_keys(const QueryFragment (&query)[kTiles][kHeadSize / 16],
                              SharedAddress keys, int lane,
                              float (&scores)[kTiles][kKeys / 16][4]) {
  using Number = Operand<Cache>;
  constexpr int kRowBytes = kHeadSize * sizeof(Cache);
  using Places = Swizzle<kRowBytes / 16>;
  const SharedAddress row = Places::row(keys, lane & 15, lane >> 4);
#pragma unroll
  for (int m = 0; m < kKeys / 16; ++m) {
    float sums[kTiles][2][4] = {};  // two chains: an instruction waits for the one before it
#pragma unroll
    for (int step = 0; step < kHeadSize / SharedRows<Cache>::kStep; ++step) {
      uint32_t key[4];
      load_matrices(Places::ahead(row, 2 * step) + m * 16 * kRowBytes, key);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (kIsFloat8<Cache>) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const uint32_t low = key[2 * part], high = key[2 * part + 1];
            const RowFragment wide = {widen_float8(low), widen_float8(high),
                                      widen_float8(low >> 16), widen_float8(high >> 16)};
            const auto& columns = query[tile][2 * step + part];
            multiply_add(Number(), sums[tile][part], wide, columns[0], columns[1]);
          }
        } else {
          const auto& columns = query[tile][step];
          multiply_add(Number(), sums[tile][step % 2], key, columns[0], columns[1]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][m][i] = sums[tile][0][i] + sums[tile][1][i];
    }
  }
}

// The column of the values that a lane's `half` belongs to, in step `step` of 16.
template <typename Cache>
__device__ int value_column(int step, int half, int lane) {
  return step * 16 + (kIsFloat8<Cache> ? lane / 4 * 2 + half : half * 8 + lane / 4);
}

// sums += values * weights, the weights laid out like scores; sums[t][step][2 * half + i] is of
// column value_column(step, half) and query 8 t + query_of(i).
template <typename Cache, int kHeadSize, int kKeys, int kTiles>
__device__ void multiply_values(const float (&weights)[kTiles][kKeys / 16][4], SharedAddress values,
                                int lane, float (&sums)[kTiles][kHeadSize / 16][4]) {
  using Number = Operand<Cache>;
  constexpr int kRowBytes = kHeadSize * sizeof(Cache);
  using Places = Swizzle<kRowBytes / 16>;
  const SharedAddress row = Places::row(values, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
#pragma unroll
  for (int m = 0; m < kKeys / 16; ++m) {
    uint32_t columns[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto& weight = weights[tile][m];
      columns[tile][0] = transpose_matrix(pack(Number(), weight[0], weight[1]));
      columns[tile][1] = transpose_matrix(pack(Number(), weight[2], weight[3]));
    }
#pragma unroll
    for (int step = 0; step < kHeadSize / SharedRows<Cache>::kStep; ++step) {
      uint32_t value[4];
      load_matrices_transposed(Places::ahead(row, 2 * step) + m * 16 * kRowBytes, value);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const auto& column = columns[tile];
        if constexpr (kIsFloat8<Cache>) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const uint32_t low = value[part], high = value[2 + part];
            const RowFragment wide = {widen_float8(__byte_perm(low, 0, 0x4420)),
                                      widen_float8(__byte_perm(low, 0, 0x4431)),
                                      widen_float8(__byte_perm(high, 0, 0x4420)),
                                      widen_float8(__byte_perm(high, 0, 0x4431))};
            multiply_add(Number(), sums[tile][2 * step + part], wide, column[0], column[1]);
          }
        } else {
          multiply_add(Number(), sums[tile][step], value, column[0], column[1]);
        }
      }
    }
  }
}

// Calls run(x, i) for each of a lane's numbers of one tile, i: the query's.
template <int kSteps, typename Numbers, typename Run>
__device__ void for_each_number(Numbers& numbers, Run&& run) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) run(numbers[step][i], i % 2);
  }
}

// The running softmax of softmax.cuh for kTiles times 8 queries.
template <int kTiles, int kHeadSize>
struct ColumnSoftmax {
  static constexpr int kSteps = kHeadSize / 16;
  float maximum[kTiles][2];  // of the logits, in base 2; -inf: no key seen
  float sum[kTiles][2];      // of exp2(logit - maximum); this lane's share until `finish`
  float out[kTiles][kSteps][4];

  __device__ void reset() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[tile][i] = -INFINITY;
        sum[tile][i] = 0.0f;
      }
      for_each_number<kSteps>(out[tile], [](float& x, int) { x = 0.0f; });
    }
  }

  // Turns the logits of the next keys into weights. Where no maximum rises, which soon is nearly
  // always, the lanes need not agree on one.
  template <int kKeys>
  __device__ void weigh(float (&scores)[kTiles][kKeys / 16][4]) {
    constexpr int kParts = kKeys / 16;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float largest[2] = {maximum[tile][0], maximum[tile][1]};
      for_each_number<kParts>(scores[tile],
                              [&](float x, int i) { largest[i] = fmaxf(largest[i], x); });
      if (warp_any(largest[0] > maximum[tile][0] || largest[1] > maximum[tile][1])) {
        raise(tile, largest);
      }
      const float base[2] = {base_of(maximum[tile][0]), base_of(maximum[tile][1])};
      for_each_number<kParts>(scores[tile], [&](float& x, int i) {
        x = exp2_approx(x - base[i]);
        sum[tile][i] += x;
      });
    }
  }

  // The sums over the lanes that share a query.
  __device__ void finish() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[tile][i] = column_sum(sum[tile][i]);
    }
  }

 private:
  __device__ void raise(int tile, const float (&largest)[2]) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float raised = column_max(largest[i]);
      shrink[i] = exp2_approx(maximum[tile][i] - base_of(raised));
      maximum[tile][i] = raised;
      sum[tile][i] *= shrink[i];
    }
    for_each_number<kSteps>(out[tile], [&](float& x, int i) { x *= shrink[i]; });
  }
};

}  // namespace paged_ops::cuda
