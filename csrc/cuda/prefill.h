// The prefill kernels for one cache type, by head size. instantiations/ holds one file for each.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"
#include "heuristics.h"

namespace paged_ops::cuda {

// Computes the sequences with at least `min_query_len` > 0 query tokens; leaves the others alone.
// `counter` is 0 and is left so.
template <typename Cache>
void run_prefill(const AttentionParams& params, int32_t min_query_len, const DeviceLimits& limits,
                 unsigned* counter, cudaStream_t stream);

// Beside a decode kernel whose CTAs have so many KV heads each.
template <typename Cache>
PrefillBeside prefill_beside(const AttentionParams& params, int32_t decode_heads,
                             const DeviceLimits& limits);

// True where the device multiplies whole warpgroups out of shared memory (wgmma), which has a
// prefill kernel of its own for caches of 16-bit elements.
template <typename Cache>
bool runs_on_warpgroups(const AttentionParams& params);

inline constexpr int kWarpgroupCtaRows = 128;

template <typename Cache>
void run_prefill_on_warpgroups(const AttentionParams& params, int32_t min_query_len,
                               const DeviceLimits& limits, unsigned* counter, cudaStream_t stream);

}  // namespace paged_ops::cuda
