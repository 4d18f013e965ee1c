// Which kernel computes a call, and what it needs for that.
#include <algorithm>

#include "../dispatch.h"
#include "decode.h"
#include "kernels.h"
#include "pieces.cuh"
#include "portable.cuh"
#include "prefill.h"
#include "warp.cuh"
#include "words.h"

namespace paged_ops::cuda {
namespace {

using BuiltCacheTypes =
    Built<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3>;
using BuiltMatrixCacheTypes = Built<DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3>;

// Elements of a head that a lane of the portable kernel holds: head sizes up to 32, 64, ... 256.
using BuiltElements = Built<1, 2, 3, 4, 6, 8>;

// Of one half of the cache.
int widest_cache_word(const CacheHalf<const void*>& half, int head_size, int element_bytes) {
  return widest_word(element_bytes, {half.data},
                     {half.stride_block, half.stride_slot, half.stride_head, head_size});
}

// The matrix units take 16-bit numbers, and rows that are loaded 16 bytes at a time. Their kernels
// divide a sequence's rows into tokens by `quotient`.
bool fits_matrix_units(const AttentionParams& params) {
  if (params.query_dtype == DType::kFloat32 || params.num_tokens >= kMostQuotient) return false;
  const int cache_bytes = bytes_of(params.cache_dtype);
  const int out_bytes = bytes_of(params.out_dtype);
  return widest_cache_word(params.key_cache, params.head_size, cache_bytes) == 16 &&
         widest_cache_word(params.value_cache, params.head_size, cache_bytes) == 16 &&
         widest_word(2, {params.query}, {params.query_stride_token, params.query_stride_head}) >=
             4 &&
         widest_word(out_bytes, {params.out}, {params.out_stride_token, params.out_stride_head}) >=
             2 * out_bytes;
}

int elements_per_lane(const AttentionParams& params) {
  return built_for(BuiltElements{}, static_cast<int>(ceil_div(params.head_size, kWarpSize)));
}

AttentionPlan plan_portable(const AttentionParams& params, const DeviceLimits& limits) {
  AttentionPlan plan{};
  const int64_t rows = params.num_tokens * ctas_per_token(params);
  plan.splits = splits_for(params, limits, rows);
  if (plan.splits == 1) return plan;
  dispatch(BuiltElements{}, elements_per_lane(params), "elements per lane", [&](auto count) {
    plan.scratch_bytes = static_cast<size_t>(rows * plan.splits) * bytes_of_split<count()>();
  });
  plan.num_counters = static_cast<size_t>(rows);
  return plan;
}

void run_portable(const AttentionParams& params, const SplitStore& store, cudaStream_t stream) {
  dispatch(BuiltCacheTypes{}, params.cache_dtype, "kv_cache dtype", [&](auto cache) {
    dispatch(BuiltElements{}, elements_per_lane(params), "elements per lane", [&](auto count) {
      launch_portable<Element<cache()>, count()>(params, store, stream);
    });
  });
}

}  // namespace

AttentionPlan plan_attention(const AttentionParams& params, const DeviceLimits& limits) {
  if (!fits_matrix_units(params)) return plan_portable(params, limits);
  AttentionPlan plan{};
  plan.on_matrix_units = true;
  plan.limits = limits;
  dispatch(BuiltMatrixCacheTypes{}, params.cache_dtype, "kv_cache dtype",
           [&](auto cache) { plan.decode = plan_decode<Element<cache()>>(params, limits); });
  for (const DecodePlan& decode : {plan.decode, plan_of_long(plan.decode)}) {
    const int64_t cells = num_cells(decode);
    const auto floats = static_cast<size_t>(cells * floats_of_cell(decode));
    plan.cells = std::max(plan.cells, cells);
    plan.scratch_bytes = std::max(plan.scratch_bytes, floats * sizeof(float));
  }
  plan.num_counters = static_cast<size_t>(2 * plan.cells) + 1;
  return plan;
}

void run_attention(const AttentionParams& params, const AttentionPlan& plan, const Scratch& scratch,
                   cudaStream_t stream) {
  auto* const memory = static_cast<float*>(scratch.memory);
  if (!plan.on_matrix_units) {
    return run_portable(params, {plan.splits, memory, scratch.counters}, stream);
  }
  // Prefill's is the first in every call: of two calls that threads make on one stream, the first
  // one's prefill may run beside the second one's decode, whatever has how many cells.
  unsigned* const num_drawn = scratch.counters;
  const PieceStore store{memory, scratch.counters + 1, plan.cells};
  DecodePlan decode = plan.decode;
  decode.prefill_follows =
      params.query_start_loc != nullptr && params.num_tokens > decode.max_query_len;
  dispatch(BuiltMatrixCacheTypes{}, params.cache_dtype, "kv_cache dtype", [&](auto cache) {
    using Cache = Element<cache()>;
    if (decode.prefill_follows) {
      decode.beside = prefill_beside<Cache>(params, decode.heads(), plan.limits);
      decode.of_long.beside = prefill_beside<Cache>(params, decode.of_long.heads(), plan.limits);
    }
    run_decode<Cache>(params, decode, store, stream);
    if (!decode.prefill_follows) return;
    run_prefill<Cache>(params, decode.max_query_len + 1, plan.limits, num_drawn, stream);
  });
}

}  // namespace paged_ops::cuda
