// Attention for any head size, block size, group size and alignment.
//
// A CTA takes one row of the query and up to kHeads of the query heads that share a KV head. Its
// warps take the tiles of kKeys visible keys in turn, each with softmax states of its own, so that
// a tile's keys and values are loaded once for all the heads and no warp waits for another. At the
// end the states are merged in the order of the warps: the result does not depend on timing.
//
// Lane l of a warp holds the elements l, l + 32, ... of every vector of head_size.
#pragma once

#include <cstdint>

#include "../params.h"
#include "element.cuh"
#include "launch.h"
#include "paged_kv.cuh"
#include "ptx.cuh"
#include "scores.cuh"
#include "sequences.cuh"
#include "softmax.cuh"
#include "warp.cuh"

namespace paged_ops::cuda {

inline constexpr int kWarps = 4;
inline constexpr int kHeads = 4;  // query heads that a CTA computes at once
inline constexpr int kKeys = 4;   // loads in flight per lane: kKeys vectors of K and of V

// The query heads of a CTA: first .. first + count - 1, all of the same KV head.
struct HeadRange {
  int kv_head;
  int first;
  int count;
};

__device__ inline HeadRange heads_of_cta(const AttentionParams& params, int index) {
  const int group_size = params.num_heads / params.num_kv_heads;
  const int ctas_per_group = (group_size + kHeads - 1) / kHeads;
  const int kv_head = index / ctas_per_group;
  const int first = index % ctas_per_group * kHeads;
  return {kv_head, kv_head * group_size + first, min(kHeads, group_size - first)};
}

// A lane's share of a vector of head_size, 0 for what is not there. The address is clamped and the
// value selected: without a branch the loads of a whole tile are in flight at once.
template <typename From, int kElements>
__device__ void load_vector(const From* vector, bool present, int head_size, int lane,
                            float (&to)[kElements]) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int d = lane + i * kWarpSize;
    const float x = to_float(vector[min(d, head_size - 1)]);
    to[i] = present && d < head_size ? x : 0.0f;
  }
}

// What one warp knows of its queries, and what it has gathered for them.
template <int kElements>
struct QueryHead {
  float query[kElements];
  Scores scores;
  SoftmaxState<kElements> state;

  __device__ void load(const AttentionParams& params, int64_t token, int head, int kv_head,
                       int lane) {
    scores = Scores::of_head(params, head, kv_head);
    const int64_t row = token * params.query_stride_token + head * params.query_stride_head;
    with_float_type(params.query_dtype, [&](auto type) {
      const auto* const vector = static_cast<const decltype(type)*>(params.query) + row;
      load_vector(vector, true, params.head_size, lane, query);
    });
  }

  // Attends to a tile of which the first `count` keys are there, the first of them `distance`
  // before the query.
  __device__ void attend(const float (&keys)[kKeys][kElements],
                         const float (&values)[kKeys][kElements], int count, int32_t distance) {
    float logits[kKeys];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kElements; ++i) dot += query[i] * keys[key][i];
      const float logit = scores.logit(warp_sum(dot), distance - key);
      logits[key] = key < count ? logit : -INFINITY;
    }
    state.update(logits, values);
  }
};

// Where the warps of a CTA put their states to be merged.
template <int kElements>
struct SharedStates {
  float maximum[kHeads][kWarps];
  float sum[kHeads][kWarps];
  float out[kHeads][kWarps][kElements][kWarpSize];

  __device__ void store(const SoftmaxState<kElements>& state, int head, int warp, int lane) {
    maximum[head][warp] = state.maximum;  // the same in every lane
    sum[head][warp] = state.sum;
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[head][warp][i][lane] = state.out[i];
  }

  __device__ SoftmaxState<kElements> merged(int head, int lane) const {
    SoftmaxState<kElements> result;
    for (int warp = 0; warp < kWarps; ++warp) {
      SoftmaxState<kElements> state;
      state.maximum = maximum[head][warp];
      state.sum = sum[head][warp];
#pragma unroll
      for (int i = 0; i < kElements; ++i) state.out[i] = out[head][warp][i][lane];
      result.merge(state);
    }
    return result;
  }
};

// The last step of a head: its row of out, and of lse if that is wanted.
template <int kElements>
__device__ void write_head(const AttentionParams& params, const SoftmaxState<kElements>& state,
                           int64_t token, int head, int kv_head, int lane) {
  const float scale = state.normalizer() * scale_of(params.v_scale, kv_head);
  const int64_t row = token * params.out_stride_token + head * params.out_stride_head;
  with_float_type(params.out_dtype, [&](auto type) {
    auto* const vector = static_cast<decltype(type)*>(params.out) + row;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int d = lane + i * kWarpSize;
      if (d < params.head_size) from_float(state.out[i] * scale, vector[d]);
    }
  });
  if (params.lse != nullptr && lane == 0) params.lse[token * params.num_heads + head] = state.lse();
}

template <typename Cache, int kElements>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    portable_kernel(const __grid_constant__ AttentionParams params) {
  wait_for_previous_kernel();
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t token = blockIdx.x;
  const HeadRange heads = heads_of_cta(params, blockIdx.y);
  const QueryRow row = locate_row(params, token);
  const KeyRange visible = visible_keys(params, row.seq_len, row.position);
  const auto kv = PagedKv<Cache>::of_head(params, row.seq, heads.kv_head);

  QueryHead<kElements> queries[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h < heads.count) queries[h].load(params, token, heads.first + h, heads.kv_head, lane);
  }
  // 64 bits: a step past the end of the longest sequence must not wrap.
  const int64_t begin = visible.begin + static_cast<int64_t>(warp * kKeys);
  for (int64_t first = begin; first < visible.end; first += kWarps * kKeys) {
    const int count = min(static_cast<int64_t>(kKeys), visible.end - first);
    float keys[kKeys][kElements];
    float values[kKeys][kElements];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const auto kv_token = kv.token(first + min(key, count - 1));
      load_vector(kv_token.key, key < count, params.head_size, lane, keys[key]);
      load_vector(kv_token.value, key < count, params.head_size, lane, values[key]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < heads.count) queries[h].attend(keys, values, count, row.position - first);
    }
  }

  __shared__ SharedStates<kElements> shared;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h < heads.count) shared.store(queries[h].state, h, warp, lane);
  }
  __syncthreads();
  for (int h = warp; h < heads.count; h += kWarps) {
    const int head = heads.first + h;
    SoftmaxState<kElements> state = shared.merged(h, lane);
    const bool sees_some = visible.begin < visible.end;
    if (sees_some && params.sinks != nullptr) state.add_sink(params.sinks[head] * kLog2E);
    write_head(params, state, token, head, heads.kv_head, lane);
  }
}

template <typename Cache, int kElements>
void launch_portable(const AttentionParams& params, cudaStream_t stream) {
  const int64_t ctas_per_group = ceil_div(params.group_size(), kHeads);
  launch<portable_kernel<Cache, kElements>>(
      params.op, {params.num_tokens, params.num_kv_heads * ctas_per_group}, kWarps * kWarpSize,
      stream, params);
}

}  // namespace paged_ops::cuda
