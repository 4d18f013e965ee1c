// From the device and the head size of a call to the prefill kernel that is built for them.
#pragma once

#include "../dispatch.h"
#include "decode.h"
#include "prefill.cuh"

namespace paged_ops::cuda {

template <typename Cache>
void run_prefill(const AttentionParams& params, int32_t min_query_len, const DeviceLimits& limits,
                 unsigned* counter, cudaStream_t stream) {
  if constexpr (!kIsFloat8<Cache>) {
    if (runs_on_warpgroups<Cache>(params)) {
      return run_prefill_on_warpgroups<Cache>(params, min_query_len, limits, counter, stream);
    }
  }
  dispatch(
      BuiltHeadSizes{}, built_for(BuiltHeadSizes{}, params.head_size), "head_size",
      [&](auto size) { launch_prefill<Cache, size()>(params, min_query_len, limits, stream); });
}

template <typename Cache>
PrefillBeside prefill_beside(const AttentionParams& params, const DeviceLimits& limits) {
  if constexpr (!kIsFloat8<Cache>) {
    if (runs_on_warpgroups<Cache>(params) && PrefillPlan::has_wide_query(params)) {
      constexpr float kFlopsPerByte = 190.0f;  // what an H100 computes here while it reads a byte
      // For an element of a key and one of its value: 4 operations in each query head.
      const float flops_per_byte = 2.0f * params.group_size() / sizeof(Cache);
      const float rows = static_cast<float>(params.num_tokens * params.num_heads);
      return {flops_per_byte / kFlopsPerByte, rows / (kWarpgroupCtaRows * limits.multiprocessors)};
    }
  }
  return {};
}

}  // namespace paged_ops::cuda
