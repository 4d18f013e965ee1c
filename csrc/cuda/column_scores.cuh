// Scores and masks of scores.cuh for queries that are columns of the matrix units.
#pragma once

#include <cstdint>

#include "query_columns.cuh"
#include "row_scores.cuh"
#include "scores.cuh"

namespace paged_ops::cuda {

// How the queries of one lane are scored. What only some tiles or some calls need is worked out
// there: registers are what the kernel that uses this is short of.
template <int kTiles>
struct ColumnScores {
  float scale[kTiles][2];

  __device__ void prepare(const AttentionParams& params, const RowBlock& block) {
    const float of_head = params.scale * scale_of(params.k_scale, block.kv_head);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) scale[tile][0] = scale[tile][1] = of_head;
  }

  // Dot products to logits in base 2. `masked`: some query does not see some of the keys from
  // `first_key` on.
  template <int kKeys>
  __device__ void apply(const AttentionParams& params, const RowBlock& block,
                        float (&scores)[kTiles][kKeys / 16][4], int32_t first_key, bool masked,
                        int lane) const {
    const bool plain = params.softcap == 0.0f && params.alibi_slopes == nullptr;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float factor[2] = {scale[tile][0] * (plain ? kLog2E : 1.0f),
                               scale[tile][1] * (plain ? kLog2E : 1.0f)};
      for_each_number<kKeys / 16>(scores[tile], [&](float& x, int i) { x *= factor[i]; });
    }
    if (!plain) bend<kKeys>(params, block, scores, first_key, lane);
    if (masked) mask<kKeys>(params, block, scores, first_key, lane);
  }

 private:
  // Calls begin(row) for each of the lane's queries, and what it gives, run(score, key), for the
  // scores of that query.
  template <int kKeys, typename Begin>
  __device__ static void for_each_query(const AttentionParams& params, const RowBlock& block,
                                        float (&scores)[kTiles][kKeys / 16][4], int32_t first_key,
                                        int lane, Begin&& begin) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile * kColumns + query_of(lane, i);
        const auto run = begin(place_of(params, block, min(row, block.num_rows - 1)));
#pragma unroll
        for (int m = 0; m < kKeys / 16; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            run(scores[tile][m][2 * half + i], first_key + m * 16 + key_of(lane, half));
          }
        }
      }
    }
  }

  template <int kKeys>
  __device__ void bend(const AttentionParams& params, const RowBlock& block,
                       float (&scores)[kTiles][kKeys / 16][4], int32_t first_key, int lane) const {
    for_each_query<kKeys>(params, block, scores, first_key, lane, [&](const RowPlace& row) {
      Scores of_row = Scores::of_head(params, row.head, block.kv_head);
      of_row.scale = 1.0f;  // applied before
      return [of_row, position = row.position](float& score, int32_t key) {
        score = of_row.logit(score, position - key);
      };
    });
  }

  template <int kKeys>
  __device__ void mask(const AttentionParams& params, const RowBlock& block,
                       float (&scores)[kTiles][kKeys / 16][4], int32_t first_key, int lane) const {
    for_each_query<kKeys>(params, block, scores, first_key, lane, [&](const RowPlace& row) {
      const KeyRange range = visible_keys(params, block.seq_len, row.position);
      return [range](float& score, int32_t key) {
        if (key < range.begin || key >= range.end) score = -INFINITY;
      };
    });
  }
};

}  // namespace paged_ops::cuda
