// The last step of a row: what the softmax has gathered becomes a row of out and of lse.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "element.cuh"
#include "fragments.cuh"
#include "ptx.cuh"
#include "row_scores.cuh"
#include "row_softmax.cuh"
#include "softmax.cuh"

namespace paged_ops::cuda {

__device__ inline void store_pair(float* to, float x, float y) {
  *reinterpret_cast<float2*>(to) = {x, y};
}
__device__ inline void store_pair(__half* to, float x, float y) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(x, y);
}
__device__ inline void store_pair(__nv_bfloat16* to, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}

// One row of out: where it lies, and what its sums are multiplied by.
struct RowOutput {
  int64_t row;  // the first element in out
  int64_t lse_index;
  float factor;
  float lse;

  __device__ static RowOutput of(const AttentionParams& params, const RowBlock& block, int row,
                                 float maximum, float sum) {
    const RowPlace place = place_of(params, block, row);
    SoftmaxState<1> state;
    state.maximum = maximum;
    state.sum = sum;
    const KeyRange visible = visible_keys(params, block.seq_len, place.position);
    const bool sees_some = visible.begin < visible.end;
    float factor = 1.0f;
    if (sees_some && params.sinks != nullptr) {
      state.add_sink(load_fresh(params.sinks + place.head) * kLog2E);
      factor = exp2f(maximum - base_of(state.maximum));  // the sums are as before the sink
    }
    factor *= state.normalizer() * scale_of(params.v_scale, block.kv_head);
    return {place.token * params.out_stride_token + place.head * params.out_stride_head,
            place.token * params.num_heads + place.head, sees_some ? factor : 0.0f, state.lse()};
  }

  template <typename Float>
  __device__ void store(Float* out, int d, float x, float y) const {
    store_pair(out + row + d, x * factor, y * factor);
  }
};

// Transposes 4 x 4 words: word i of lane l of each four neighbours becomes word l of lane i.
__device__ inline void transpose_quads(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &low = words[i * (3 - distance)], &high = words[i * (3 - distance) + distance];
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      (upper ? low : high) = other;
    }
  }
}

// A row of 16-bit numbers by the four lanes that have it, 16 bytes at a time. nullptr: no row.
template <int kHeadSize, typename Number>
__device__ void store_wide(Number* row, const float (&sums)[kHeadSize / 8][4], int half,
                           float factor, int head_size, int lane) {
#pragma unroll
  for (int n = 0; n < kHeadSize / 8; n += 4) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack(Number(), sums[n + i][2 * half] * factor, sums[n + i][2 * half + 1] * factor);
    }
    transpose_quads(words, lane);
    const int column = (n + lane % 4) * 8;
    if (row != nullptr && column < head_size) {
      *reinterpret_cast<uint4*>(row + column) = {words[0], words[1], words[2], words[3]};
    }
  }
}

// By the four lanes that share it: one of their rows. Nothing is written where it is not `present`.
template <typename Cache, int kHeadSize>
__device__ void write_row(const AttentionParams& params, const RowOutput& output, bool wide,
                          bool present, const float (&sums)[kHeadSize / 8][4], int half, int lane) {
  with_float_type(params.out_dtype, [&](auto type) {
    using Float = decltype(type);
    auto* const out = static_cast<Float*>(params.out);
    if constexpr (!kIsFloat8<Cache> && !std::is_same_v<Float, float>) {
      if (wide) {
        return store_wide<kHeadSize>(present ? out + output.row : nullptr, sums, half,
                                     output.factor, params.head_size, lane);
      }
    }
    for_each_pair<Cache, kHeadSize>(sums, half, lane, [&](int d, float x, float y) {
      if (present && d < params.head_size) output.store(out, d, x, y);
    });
  });
  if (present && params.lse != nullptr && lane % 4 == 0) params.lse[output.lse_index] = output.lse;
}

// By a warp: writes the rows that `softmax` has gathered, from row `first_row` of the block on;
// 16-bit numbers 16 bytes at a time if `wide`.
template <typename Cache, int kTiles, int kHeadSize>
__device__ void write_rows(const AttentionParams& params, bool wide, const RowBlock& block,
                           int first_row, RowSoftmax<kTiles, kHeadSize>& softmax, int lane) {
  softmax.finish();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + RowScores<kTiles>::row_of(tile, half, lane);
      const RowOutput output =
          RowOutput::of(params, block, row, softmax.base[tile][half], softmax.sum[tile][half]);
      write_row<Cache, kHeadSize>(params, output, wide, row < block.num_rows, softmax.out[tile],
                                  half, lane);
    }
  }
}

// Rows of the query that belong to no sequence: 0 in out, -inf in lse. Not inlined: it is rare.
__device__ __noinline__ inline void zero_rows_without_sequence(const AttentionParams& params) {
  const int64_t before = params.query_start_loc[0];
  const int64_t after = params.num_tokens - params.query_start_loc[params.num_seqs];
  const int64_t heads = params.num_heads;
  const int64_t cta = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  for (int64_t i = cta; i < (before + after) * heads; i += int64_t{gridDim.x} * gridDim.y) {
    const int64_t index = i / heads, head = i % heads;
    const int64_t token = index < before ? index : params.num_tokens - after + index - before;
    with_float_type(params.out_dtype, [&](auto type) {
      auto* const row = static_cast<decltype(type)*>(params.out) + token * params.out_stride_token +
                        head * params.out_stride_head;
      for (int d = threadIdx.x; d < params.head_size; d += blockDim.x) from_float(0.0f, row[d]);
    });
    if (params.lse != nullptr && threadIdx.x == 0) params.lse[token * heads + head] = -INFINITY;
  }
}

}  // namespace paged_ops::cuda
