// Scores and masks of scores.cuh for the rows of the matrix units.
#pragma once

#include <cstdint>

#include "fragments.cuh"
#include "scores.cuh"

namespace paged_ops::cuda {

// The rows of one KV head that are computed together: row r belongs to query token r / group_size
// of the sequence and to query head kv_head * group_size + r % group_size.
struct RowBlock {
  int64_t first_token;  // of the sequence, in the query
  int32_t query_len;
  int32_t seq_len;
  int32_t kv_head;
  int32_t first_row;
  int32_t num_rows;
};

struct RowPlace {
  int64_t token;
  int32_t head;
  int32_t position;  // among the keys
};

__device__ inline RowPlace place_of(const AttentionParams& params, const RowBlock& block, int row) {
  const int group_size = quotient(params.num_heads, params.num_kv_heads);
  const int in_block = block.first_row + row;
  const int token = quotient(in_block, group_size);
  return {block.first_token + token, block.kv_head * group_size + in_block - token * group_size,
          block.seq_len - block.query_len + token};
}

// Keys that some of the rows first .. first + count - 1 see, and those that all of them see.
struct RowKeys {
  KeyRange any;
  KeyRange all;

  __device__ static RowKeys of(const AttentionParams& params, const RowBlock& block, int first,
                               int count) {
    const auto keys = [&](int row) {
      return visible_keys(params, block.seq_len, place_of(params, block, row).position);
    };
    const KeyRange top = keys(first), bottom = keys(first + count - 1);
    return {{top.begin, bottom.end}, {bottom.begin, top.end}};
  }
};

// From dot products to logits in base 2, for kTiles times 16 rows: logit = score * factor, where
// what `apply` has left is the score. What only some tiles or some calls need is worked out there:
// registers are what the kernel that uses this is short of.
template <int kTiles>
struct RowScores {
  float factor;  // positive
  bool plain;    // a dot product is a score

  __device__ static RowScores of(const AttentionParams& params, int kv_head) {
    const float scale = params.scale * scale_of(params.k_scale, kv_head);
    const bool plain = params.softcap == 0.0f && params.alibi_slopes == nullptr && scale > 0.0f;
    return {plain ? scale * kLog2E : 1.0f, plain};
  }

  // `query_scales`: what the dot products of the block's rows are to be multiplied by; nullptr: 1.
  // `masked`: some row does not see some of the keys from `first_key` on.
  template <int kKeys>
  __device__ void apply(const AttentionParams& params, const RowBlock& block, int first_row,
                        const float* query_scales, float (&scores)[kTiles][kKeys / 8][4],
                        int32_t first_key, bool masked, int lane) const {
    if (query_scales != nullptr) multiply<kKeys>(query_scales + first_row, scores, lane);
    if (!plain) bend<kKeys>(params, block, first_row, scores, first_key, lane);
    if (masked) mask<kKeys>(params, block, first_row, scores, first_key, lane);
  }

  // The row, of 16 * kTiles, that is a lane's `half` of a tile.
  __device__ static int row_of(int tile, int half, int lane) {
    return tile * kRows + half * 8 + lane / 4;
  }

 private:
  __device__ static RowPlace place(const AttentionParams& params, const RowBlock& block, int row) {
    return place_of(params, block, min(row, block.num_rows - 1));
  }

  // Calls run(score, key) for the scores of one row.
  template <int kKeys, typename Run>
  __device__ static void for_each_key(float (&scores)[kKeys / 8][4], int half, int32_t first_key,
                                      int lane, Run&& run) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        run(scores[n][2 * half + i], first_key + n * 8 + (lane & 3) * 2 + i);
      }
    }
  }

  template <int kKeys>
  __device__ static void multiply(const float* row_scales, float (&scores)[kTiles][kKeys / 8][4],
                                  int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = row_scales[row_of(tile, half, lane)];
        for_each_key<kKeys>(scores[tile], half, 0, lane,
                            [&](float& score, int32_t) { score *= scale; });
      }
    }
  }

  // softcap * tanh(score / softcap) by an exponential: the error, absolute, is that of 1.
  __device__ static float cap(float score, float softcap) {
    const float power = exp2_approx(score * (2.0f * kLog2E / softcap));
    return softcap - __fdividef(2.0f * softcap, power + 1.0f);
  }

  template <int kKeys>
  __device__ void bend(const AttentionParams& params, const RowBlock& block, int first_row,
                       float (&scores)[kTiles][kKeys / 8][4], int32_t first_key, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowPlace at = place(params, block, first_row + row_of(tile, half, lane));
        const Scores of_row = Scores::of_head(params, at.head, block.kv_head);
        for_each_key<kKeys>(scores[tile], half, first_key, lane, [&](float& score, int32_t key) {
          float logit = of_row.scale * score;
          if (params.softcap > 0.0f) logit = cap(logit, params.softcap);
          logit -= of_row.alibi_slope * static_cast<float>(abs(at.position - key));
          score = logit * kLog2E;
        });
      }
    }
  }

  template <int kKeys>
  __device__ void mask(const AttentionParams& params, const RowBlock& block, int first_row,
                       float (&scores)[kTiles][kKeys / 8][4], int32_t first_key, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowPlace at = place(params, block, first_row + row_of(tile, half, lane));
        const KeyRange range = visible_keys(params, block.seq_len, at.position);
        for_each_key<kKeys>(scores[tile], half, first_key, lane, [&](float& score, int32_t key) {
          if (key < range.begin || key >= range.end) score = -INFINITY;
        });
      }
    }
  }
};

}  // namespace paged_ops::cuda
