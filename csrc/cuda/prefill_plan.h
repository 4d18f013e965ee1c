// What both prefill kernels are told beside the params.
#pragma once

#include <cstdint>

#include "../params.h"
#include "division.h"
#include "heuristics.h"
#include "row_blocks.cuh"
#include "words.h"

namespace paged_ops::cuda {

struct PrefillPlan {
  RowBlocks blocks;
  Divisor block_size;
  Divisor group_size;
  bool wide_query;  // rows of the query can be loaded 16 bytes at a time

  // For blocks of `rows` query rows, a power of two.
  static PrefillPlan of(const AttentionParams& params, int rows, int32_t min_query_len) {
    const int query_word =
        widest_word(2, {params.query}, {params.query_stride_token, params.query_stride_head});
    return {{log2_of(rows), Divisor::of(min_query_len)},
            Divisor::of(params.block_size),
            Divisor::of(params.group_size()),
            query_word == 16};
  }
};

}  // namespace paged_ops::cuda
