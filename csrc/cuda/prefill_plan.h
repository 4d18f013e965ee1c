// What both prefill kernels are told beside the params, and what they work out of it.
#pragma once

#include <cstdint>

#include "../params.h"
#include "division.h"
#include "heuristics.h"
#include "ptx.cuh"
#include "row_blocks.cuh"
#include "words.h"

namespace paged_ops::cuda {

struct PrefillPlan {
  RowBlocks blocks;
  Divisor block_size;
  Divisor group_size;
  bool wide_query;  // rows of the query can be loaded 16 bytes at a time
  bool wide_out;    // and those of a result of 16-bit numbers stored

  // For blocks of `rows` query rows, a power of two.
  static PrefillPlan of(const AttentionParams& params, int rows, int32_t min_query_len) {
    return {{log2_of(rows), Divisor::of(min_query_len)},
            Divisor::of(params.block_size),
            Divisor::of(params.group_size()),
            has_wide_query(params),
            has_wide_out(params)};
  }

  static bool has_wide_query(const AttentionParams& params) {
    const int query_word =
        widest_word(2, {params.query}, {params.query_stride_token, params.query_stride_head});
    return query_word == 16;
  }

  static bool has_wide_out(const AttentionParams& params) {
    const int out_word = widest_word(
        2, {params.out}, {params.out_stride_token, params.out_stride_head, params.head_size});
    return out_word == 16;
  }

  // Where row `row` of a block is, or would be, in the query. For elements of 16 bits.
  __device__ const char* query_row(const AttentionParams& params, const RowBlock& block,
                                   int row) const {
    const int in_sequence = block.first_row + row;
    const int64_t token = block.first_token + group_size.quotient(in_sequence);
    const int64_t head = block.kv_head * group_size.value + group_size.remainder(in_sequence);
    const int64_t element = token * params.query_stride_token + head * params.query_stride_head;
    return static_cast<const char*>(params.query) + element * 2;
  }

  // Places of a launch, blocks of one KV head beside those of another: there is one more than there
  // can be blocks.
  int64_t num_places(const AttentionParams& params) const {
    return (blocks.num_places(params) + 1) * params.num_kv_heads;
  }
};

// The tiles of keys that some row of a block sees; they begin at multiples of kKeys.
template <int kKeys>
struct TileRange {
  KeyRange keys;
  int32_t first;
  int32_t count;

  __device__ static TileRange of(const AttentionParams& params, const RowBlock& block) {
    const KeyRange keys = RowKeys::of(params, block, 0, block.num_rows).any;
    const int32_t first = keys.begin / kKeys;
    return {keys, first, keys.begin < keys.end ? (keys.end - 1) / kKeys - first + 1 : 0};
  }
  __device__ int32_t first_key(int tile) const { return (first + tile) * kKeys; }
  __device__ bool contains(int32_t key) const { return key >= keys.begin && key < keys.end; }
};

// The first statement of a prefill kernel. The decode kernel of the same call is before it, whose
// CTAs have waited for all that was before, and which writes other rows: no CTA has to wait for it,
// as long as what may have been written shortly before is read past the first-level cache, which a
// query in small pieces is not. But what comes after this kernel waits for this one alone, so its
// last CTA does: where each CTA has one block, it has none, and where CTAs draw blocks, the others
// draw them meanwhile.
__device__ inline void wait_where_needed(const PrefillPlan& plan) {
  if (!plan.wide_query || blockIdx.x + 1 == gridDim.x) wait_for_previous_kernel();
}

}  // namespace paged_ops::cuda
