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
PrefillBeside prefill_beside(const AttentionParams& params, int32_t decode_heads,
                             const DeviceLimits& limits) {
  if constexpr (!kIsFloat8<Cache>) {
    if (runs_on_warpgroups<Cache>(params) && PrefillPlan::has_wide_query(params)) {
      // Of a multiprocessor of an H100, in a second: what this kernel computes, and what a CTA of
      // the decode kernel reads at most, in short runs of memory and in longer ones.
      constexpr float kFlops = 4.8e12f, kShortRuns = 42e9f, kLongRuns = 60e9f;
      const bool short_runs = decode_heads * params.head_size * sizeof(Cache) <= 256;
      const float bandwidth = limits.bandwidth / limits.multiprocessors;
      // For an element of a key and one of its value: 4 operations in each query head.
      const float flops_per_byte = 2.0f * params.group_size() / sizeof(Cache);
      const float rows = static_cast<float>(params.num_tokens * params.num_heads);
      return {flops_per_byte * bandwidth / kFlops,
              rows / (kWarpgroupCtaRows * limits.multiprocessors),
              bandwidth / (short_runs ? kShortRuns : kLongRuns)};
    }
  }
  return {};
}

}  // namespace paged_ops::cuda
