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

// The rows of one lane: how they are scored and what they see. What only some tiles or some calls
// need is worked out there: registers are what the kernels that use this are short of.
template <int kTiles>
struct RowScores {
  float scale[kTiles][2];
  int32_t position[kTiles][2];
  int32_t seq_len;

  __device__ void prepare(const AttentionParams& params, const RowBlock& block, int lane) {
    seq_len = block.seq_len;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(tile * kRows + half * 8 + lane / 4, block.num_rows - 1);
        scale[tile][half] = params.scale * scale_of(params.k_scale, block.kv_head);
        position[tile][half] = place_of(params, block, row).position;
      }
    }
  }

  // Dot products to logits in base 2. `masked`: some row does not see some of the keys from
  // `first_key` on.
  template <int kActive, int kKeys>
  __device__ void apply(const AttentionParams& params, const RowBlock& block,
                        float (&scores)[kTiles][kKeys / 8][4], int32_t first_key, bool masked,
                        int lane) const {
    const bool plain = params.softcap == 0.0f && params.alibi_slopes == nullptr;
#pragma unroll
    for (int tile = 0; tile < kActive; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = plain ? scale[tile][half] * kLog2E : scale[tile][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          scores[tile][n][2 * half] *= factor;
          scores[tile][n][2 * half + 1] *= factor;
        }
      }
    }
    if (!plain) bend<kActive, kKeys>(params, block, scores, first_key, lane);
    if (masked) mask<kActive, kKeys>(params, scores, first_key, lane);
  }

 private:
  __device__ static int32_t key_of(int32_t first_key, int n, int i, int lane) {
    return first_key + n * 8 + (lane & 3) * 2 + i;
  }

  template <int kActive, int kKeys>
  __device__ void bend(const AttentionParams& params, const RowBlock& block,
                       float (&scores)[kTiles][kKeys / 8][4], int32_t first_key, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kActive; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(tile * kRows + half * 8 + lane / 4, block.num_rows - 1);
        Scores of_row = Scores::of_head(params, place_of(params, block, row).head, block.kv_head);
        of_row.scale = 1.0f;  // applied before
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[tile][n][2 * half + i];
            score = of_row.logit(score, position[tile][half] - key_of(first_key, n, i, lane));
          }
        }
      }
    }
  }

  template <int kActive, int kKeys>
  __device__ void mask(const AttentionParams& params, float (&scores)[kTiles][kKeys / 8][4],
                       int32_t first_key, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kActive; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange range = visible_keys(params, seq_len, position[tile][half]);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int32_t key = key_of(first_key, n, i, lane);
            if (key < range.begin || key >= range.end) scores[tile][n][2 * half + i] = -INFINITY;
          }
        }
      }
    }
  }
};

}  // namespace paged_ops::cuda
