// How the query rows of a batch are cut into blocks, and how a CTA finds one.
//
// The blocks of all sequences stand in a row in which each sequence has enough places, so that its
// first place follows from where its query starts alone: a search finds the sequence of a place,
// and the host can tell how many places there are without knowing a length. Places that are left
// over have no block.
#pragma once

#include <cstdint>

#include "../params.h"
#include "division.h"
#include "ptx.cuh"
#include "row_scores.cuh"
#include "warp.cuh"

namespace paged_ops::cuda {

// Blocks of 2^rows_log2 rows, of the sequences with at least `min_query_len` query tokens.
struct RowBlocks {
  int32_t rows_log2;
  Divisor min_query_len;

  // Each of these sequences moves both summands on, by its rows and by one at least: that is room
  // for one block that is not full.
  __host__ __device__ int64_t first_place(const AttentionParams& params, int64_t seq,
                                          int32_t start) const {
    const int64_t group_size = params.num_heads / params.num_kv_heads;
    const int64_t sequences = min_query_len.quotient(start);
    return (start * group_size >> rows_log2) + (seq < sequences ? seq : sequences);
  }

  int64_t num_places(const AttentionParams& params) const {
    return first_place(params, params.num_seqs, static_cast<int32_t>(params.num_tokens));
  }

  // By a whole warp: the block at a place, for one KV head, and its sequence; no rows if there is
  // none. The later rows of a sequence see more keys: they come first, for the last CTAs to end at
  // about the same time.
  __device__ RowBlock at(const AttentionParams& params, int64_t place, int32_t kv_head,
                         int64_t* sequence) const {
    const int64_t seq = last_at_or_before(params, place);
    if (seq < 0) return RowBlock{};
    const int32_t start = load_fresh(params.query_start_loc + seq);
    const int32_t query_len = load_fresh(params.query_start_loc + seq + 1) - start;
    if (query_len < min_query_len.value) return RowBlock{};
    const int32_t num_rows = query_len * (params.num_heads / params.num_kv_heads);
    const int32_t num_blocks = ((num_rows - 1) >> rows_log2) + 1;
    const int64_t from_last = place - first_place(params, seq, start);
    if (from_last >= num_blocks) return RowBlock{};
    *sequence = seq;
    const int32_t first_row = (num_blocks - 1 - static_cast<int32_t>(from_last)) << rows_log2;
    return {start,   query_len, load_fresh(params.seq_lens + seq),
            kv_head, first_row, min(1 << rows_log2, num_rows - first_row)};
  }

 private:
  // The last sequence whose first place is at or before `place`; -1: none. By a whole warp: its
  // lanes try as many sequences at once.
  __device__ int64_t last_at_or_before(const AttentionParams& params, int64_t place) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    int64_t below = 0;  // first_place(0 .. below - 1) <= place < first_place(above ..)
    int64_t above = params.num_seqs;
    while (below < above) {
      const int64_t step = (above - below + kWarpSize - 1) / kWarpSize;
      const int64_t tried = below + (lane + 1) * step - 1;
      const int32_t start = tried < above ? load_fresh(params.query_start_loc + tried) : 0;
      below += step * warp_count(tried < above && first_place(params, tried, start) <= place);
      above = min(above, below + step - 1);
    }
    return below - 1;
  }
};

}  // namespace paged_ops::cuda
