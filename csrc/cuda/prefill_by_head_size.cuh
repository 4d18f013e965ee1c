// From the device and the head size of a call to the prefill kernel that is built for them.
#pragma once

#include "../dispatch.h"
#include "decode.h"
#include "prefill.cuh"

namespace paged_ops::cuda {

template <typename Cache>
void run_prefill(const AttentionParams& params, int32_t min_query_len, const DeviceLimits& limits,
                 cudaStream_t stream) {
  if constexpr (!kIsFloat8<Cache>) {
    if (run_prefill_on_warpgroups<Cache>(params, min_query_len, stream)) return;
  }
  dispatch(
      BuiltHeadSizes{}, built_for(BuiltHeadSizes{}, params.head_size), "head_size",
      [&](auto size) { launch_prefill<Cache, size()>(params, min_query_len, limits, stream); });
}

}  // namespace paged_ops::cuda
