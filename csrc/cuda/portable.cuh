// Attention for any head size, block size, group size and alignment.
//
// A CTA takes one row of the query and up to kHeads of the query heads that share a KV head. Its
// warps take the tiles of kKeys visible keys in turn, each with softmax states of its own, so that
// a tile's keys and values are loaded once for all the heads and no warp waits for another. At the
// end the states are merged in the order of the warps: the result does not depend on timing.
//
// Where that would leave multiprocessors idle, several CTAs share the keys of a row, and the last
// one to end merges their states, in the order of the keys.
//
// Lane l of a warp holds the elements l, l + 32, ... of every vector of head_size.
#pragma once

#include <cstdint>

#include "../params.h"
#include "arrival.cuh"
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

// The keys of one of the CTAs that share a row, an even part of the visible ones.
struct Split {
  int index;
  int count;  // that have keys, or 1
  KeyRange keys;

  __device__ static Split of(const KeyRange& visible, uint32_t index, uint32_t most) {
    constexpr uint32_t kStep = kWarps * kKeys;
    const auto num_keys = static_cast<uint32_t>(max(visible.end - visible.begin, 0));
    const uint32_t steps = (num_keys + kStep - 1) / kStep;
    const uint32_t size = (steps + most - 1) / most * kStep;  // of each but the last
    const uint32_t count = num_keys == 0 ? 1 : (num_keys + size - 1) / size;
    const uint32_t begin = min(index * size, num_keys), end = min(begin + size, num_keys);
    return {
        static_cast<int>(index),
        static_cast<int>(count),
        {visible.begin + static_cast<int32_t>(begin), visible.begin + static_cast<int32_t>(end)}};
  }
};

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

// States in memory, to be merged: of a warp in shared memory, of a CTA in scratch memory.
template <int kElements>
struct StoredStates {
  static constexpr int kFloats = kElements * kWarpSize + 2;

  __device__ static void store(const SoftmaxState<kElements>& state, float* to, int lane) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) to[i * kWarpSize + lane] = state.out[i];
    if (lane > 0) return;
    to[kFloats - 2] = state.maximum;  // the same in every lane
    to[kFloats - 1] = state.sum;
  }

  // Of `count` states, `stride` floats apart, in their order.
  __device__ static SoftmaxState<kElements> merged(const float* from, int count, int stride,
                                                   int lane) {
    SoftmaxState<kElements> result;
#pragma unroll 4
    for (int index = 0; index < count; ++index, from += stride) {
      SoftmaxState<kElements> state;
#pragma unroll
      for (int i = 0; i < kElements; ++i) state.out[i] = from[i * kWarpSize + lane];
      state.maximum = from[kFloats - 2];
      state.sum = from[kFloats - 1];
      result.merge(state);
    }
    return result;
  }
};

// Scratch memory of a call whose rows are shared by several CTAs.
struct SplitStore {
  int splits;         // CTAs of a row
  float* states;      // [rows, splits, kHeads] states
  unsigned* arrived;  // [rows], 0 before and after every call
};

// The last step of a head: its row of out, and of lse if that is wanted.
template <int kElements>
__device__ void write_head(const AttentionParams& params, SoftmaxState<kElements> state,
                           bool sees_some, int64_t token, int head, int kv_head, int lane) {
  if (sees_some && params.sinks != nullptr) state.add_sink(params.sinks[head] * kLog2E);
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

// Attends with the first `num_heads` queries, which are at `position`, to the warp's tiles of
// `range`.
template <typename Cache, int kElements>
__device__ void attend_to(const PagedKv<Cache>& kv, const KeyRange& range, int32_t position,
                          int head_size, int num_heads, QueryHead<kElements> (&queries)[kHeads]) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  // 64 bits: a step past the end of the longest sequence must not wrap.
  const int64_t begin = range.begin + static_cast<int64_t>(warp * kKeys);
  for (int64_t first = begin; first < range.end; first += kWarps * kKeys) {
    const int count = min(static_cast<int64_t>(kKeys), range.end - first);
    float keys[kKeys][kElements];
    float values[kKeys][kElements];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const auto token = kv.token(first + min(key, count - 1));
      load_vector(token.key, key < count, head_size, lane, keys[key]);
      load_vector(token.value, key < count, head_size, lane, values[key]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < num_heads) queries[h].attend(keys, values, count, position - first);
    }
  }
}

template <typename Cache, int kElements>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    portable_kernel(const __grid_constant__ AttentionParams params,
                    const __grid_constant__ SplitStore store) {
  wait_for_previous_kernel();
  using States = StoredStates<kElements>;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t token = blockIdx.x / store.splits;
  const HeadRange heads = heads_of_cta(params, blockIdx.y);
  const QueryRow row = locate_row(params, token);
  const KeyRange visible = visible_keys(params, row.seq_len, row.position);
  const Split split = Split::of(visible, blockIdx.x % store.splits, store.splits);
  if (split.index >= split.count) return;
  const auto kv = PagedKv<Cache>::of_head(params, row.seq, heads.kv_head);

  QueryHead<kElements> queries[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h < heads.count) queries[h].load(params, token, heads.first + h, heads.kv_head, lane);
  }
  attend_to(kv, split.keys, row.position, params.head_size, heads.count, queries);

  __shared__ float of_warps[kHeads][kWarps][States::kFloats];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h < heads.count) States::store(queries[h].state, of_warps[h][warp], lane);
  }
  __syncthreads();
  // Each warp puts some of the heads together, from `states` on `stride` floats apart.
  const auto merge = [&](const float* states, int count, int stride, int of_head, auto&& use) {
    for (int h = warp; h < heads.count; h += kWarps) {
      use(h, States::merged(states + h * of_head, count, stride, lane));
    }
  };
  const auto write = [&](int h, const SoftmaxState<kElements>& state) {
    write_head(params, state, visible.begin < visible.end, token, heads.first + h, heads.kv_head,
               lane);
  };
  constexpr int kOfHead = kWarps * States::kFloats, kOfCta = kHeads * States::kFloats;
  if (split.count == 1) return merge(of_warps[0][0], kWarps, States::kFloats, kOfHead, write);

  const int64_t index = token * gridDim.y + blockIdx.y;
  float* const of_row = store.states + index * store.splits * kOfCta;
  merge(of_warps[0][0], kWarps, States::kFloats, kOfHead, [&](int h, const auto& state) {
    States::store(state, of_row + split.index * kOfCta + h * States::kFloats, lane);
  });
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) is_last = last_to_arrive(store.arrived + index, split.count);
  __syncthreads();
  if (is_last) merge(of_row, split.count, kOfCta, States::kFloats, write);
}

// Where keys are not shared.
inline int64_t ctas_per_token(const AttentionParams& params) {
  return params.num_kv_heads * ceil_div(params.group_size(), kHeads);
}

template <int kElements>
constexpr size_t bytes_of_split() {
  return kHeads * StoredStates<kElements>::kFloats * sizeof(float);
}

template <typename Cache, int kElements>
void launch_portable(const AttentionParams& params, const SplitStore& store, cudaStream_t stream) {
  launch<portable_kernel<Cache, kElements>>(
      params.op, {params.num_tokens * store.splits, ctas_per_token(params)}, kWarps * kWarpSize,
      stream, params, store);
}

}  // namespace paged_ops::cuda
