// From the head size of a call to the decode kernel that is built for it.
#pragma once

#include "decode.cuh"
#include "decode.h"

namespace paged_ops::cuda {

template <typename Cache>
DecodePlan plan_decode(const AttentionParams& params, const DeviceLimits& limits) {
  DecodePlan plan{};
  dispatch(BuiltHeadSizes{}, built_for(BuiltHeadSizes{}, params.head_size), "head_size",
           [&](auto size) { plan = Decode<Cache, size()>::plan(params, limits); });
  return plan;
}

template <typename Cache>
void run_decode(const AttentionParams& params, const DecodePlan& plan, const PieceStore& store,
                cudaStream_t stream) {
  dispatch(BuiltHeadSizes{}, built_for(BuiltHeadSizes{}, params.head_size), "head_size",
           [&](auto size) { Decode<Cache, size()>::launch(params, plan, store, stream); });
}

}  // namespace paged_ops::cuda
