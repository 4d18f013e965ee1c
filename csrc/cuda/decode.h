// The decode kernel for one cache type, by head size. instantiations/ holds one file for each.
#pragma once

#include <cuda_runtime_api.h>

#include "../dispatch.h"
#include "heuristics.h"

namespace paged_ops::cuda {

struct PieceStore;

// Head sizes that are computed as such; smaller ones are padded in shared memory, not in the cache.
using BuiltHeadSizes = Built<64, 96, 128, 192, 256>;

template <typename Cache>
DecodePlan plan_decode(const AttentionParams& params, const DeviceLimits& limits);

template <typename Cache>
void run_decode(const AttentionParams& params, const DecodePlan& plan, const PieceStore& store,
                cudaStream_t stream);

}  // namespace paged_ops::cuda
