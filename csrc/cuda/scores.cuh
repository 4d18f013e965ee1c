// From q . k to the logit, and which keys a query sees. The options cost nothing per score next to
// the loads, so they are branches at run time, the same for every thread of a CTA.
#pragma once

#include <cstdint>

#include "../params.h"
#include "element.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

namespace paged_ops::cuda {

// Keys begin .. end-1; none where end <= begin.
struct KeyRange {
  int32_t begin;
  int32_t end;
};

// What a query at `position` sees; nothing, if it is negative.
__device__ inline KeyRange visible_keys(const AttentionParams& params, int32_t seq_len,
                                        int32_t position) {
  if (position < 0) return {0, 0};
  const int32_t end = params.causal ? min(seq_len, position + 1) : seq_len;
  const bool limited = params.window >= 0 && params.window <= position;
  return {limited ? static_cast<int32_t>(position + 1 - params.window) : 0, end};
}

// The logits of one query head.
struct Scores {
  float scale;  // of the query's and the cache's values together
  float softcap;
  float alibi_slope;

  __device__ static Scores of_head(const AttentionParams& params, int head, int kv_head) {
    return {params.scale * scale_of(params.k_scale, kv_head), params.softcap,
            params.alibi_slopes == nullptr ? 0.0f : load_fresh(params.alibi_slopes + head)};
  }

  // In base 2; `distance` is position minus key.
  __device__ float logit(float dot, int32_t distance) const {
    float score = scale * dot;
    if (softcap > 0.0f) score = softcap * tanhf(__fdividef(score, softcap));
    score -= alibi_slope * static_cast<float>(abs(distance));
    return score * kLog2E;
  }
};

}  // namespace paged_ops::cuda
