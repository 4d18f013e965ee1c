// Which sequence a row of the query belongs to, and where in it.
#pragma once

#include <cstdint>

#include "../params.h"

namespace paged_ops::cuda {

struct QueryRow {
  int64_t seq;
  int32_t seq_len;
  int32_t position;  // among the keys; negative: sees none, also where the row has no sequence
};

// The last sequence that starts at or before `token`: -1 if none does, num_seqs past the last row.
__device__ inline int64_t find_sequence(const int32_t* query_start_loc, int64_t num_seqs,
                                        int64_t token) {
  int64_t below = 0;  // query_start_loc[0 .. below) <= token < query_start_loc[above ..]
  int64_t above = num_seqs + 1;
  while (below < above) {
    const int64_t middle = (below + above) / 2;
    if (query_start_loc[middle] <= token) {
      below = middle + 1;
    } else {
      above = middle;
    }
  }
  return below - 1;
}

__device__ inline QueryRow locate_row(const AttentionParams& params, int64_t token) {
  if (params.query_start_loc == nullptr) {
    const int32_t seq_len = params.seq_lens[token];
    return {token, seq_len, seq_len - 1};
  }
  const int64_t seq = find_sequence(params.query_start_loc, params.num_seqs, token);
  if (seq < 0 || seq == params.num_seqs) return {seq, 0, -1};
  const int32_t seq_len = params.seq_lens[seq];
  const int32_t end = params.query_start_loc[seq + 1];
  return {seq, seq_len, seq_len - (end - static_cast<int32_t>(token))};
}

}  // namespace paged_ops::cuda
