// How the keys of a batch are cut into even shares on the device, from nothing but the lengths.
//
// The work is a row of units: the tiles of the first sequence, then of the second, and so on. They
// are cut into shares that differ by one tile at most, whatever the lengths (stream-K;
// "LeanAttention", Sanovar et al., 2024), and as evenly as that goes: sequences of one length are
// cut where they end if their number allows it (heuristics.h). A sequence that several shares have
// a part of is put together from its pieces (pieces.cuh).
//
// How many KV heads a CTA has, and so how many shares there are, is known on the host for most
// batches. For small ones it depends on the lengths, and each CTA finds which of two cuts it is.
//
// Where the prefill kernel of the same call can start beside, there are fewer shares, and it gets
// the multiprocessors of the others: a part of them reads as fast as all ("POD-Attention", Kamath
// et al., 2024, runs the two side by side on each).
//
// In the batch-invariant mode sequences are cut into chunks of tiles, by nothing but their lengths
// and what all calls have in common, and a share has the chunks that begin in it: the pieces of a
// sequence, and so its result to the bit, are the same in every batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "heuristics.h"
#include "launch.h"
#include "warp.cuh"

namespace paged_ops::cuda {

// The plan with its other cut.
__host__ __device__ inline DecodePlan plan_of_long(DecodePlan plan) {
  static_cast<DecodeCut&>(plan) = plan.of_long;
  return plan;
}

// Places for pieces, see Piece.
inline int64_t num_cells(const DecodePlan& plan) {
  const int64_t slots_of_share = plan.batch_invariant ? 2 << plan.max_chunks_log2 : 2;
  return plan.num_shares * slots_of_share * plan.num_columns;
}

// A sequence and the keys that its queries see among them.
struct Span {
  int32_t first_token;  // in the query
  int32_t query_len;
  int32_t seq_len;
  int32_t begin;      // keys begin .. seq_len-1 are seen by some query
  int32_t num_tiles;  // 0: not decoded here
};

__device__ inline Span span_of(const AttentionParams& params, const DecodePlan& plan, int32_t seq) {
  Span span{seq, 1, params.seq_lens[seq], 0, 0};
  if (params.query_start_loc != nullptr) {
    span.first_token = params.query_start_loc[seq];
    span.query_len = params.query_start_loc[seq + 1] - span.first_token;
  }
  const int32_t first_position = span.seq_len - span.query_len;
  if (params.window >= 0 && params.window <= first_position) {
    span.begin = first_position + 1 - static_cast<int32_t>(params.window);
  }
  if (span.query_len <= 0 || span.query_len > plan.max_query_len) return span;
  const int32_t end = static_cast<int32_t>(
      (static_cast<uint32_t>(span.seq_len) + plan.tile_keys() - 1) >> plan.tile_keys_log2);
  // One also for no keys: the rows have to be written.
  span.num_tiles = max(end - (span.begin >> plan.tile_keys_log2), 1);
  return span;
}

// Tiles of a chunk. The block table bounds max_chunks_log2 too, but then no length that it has room
// for has more chunks than that of min_chunk_tiles each: the length alone decides.
__device__ inline int32_t chunk_tiles(const DecodePlan& plan, const Span& span) {
  const int32_t most = 1 << plan.max_chunks_log2;
  return max(plan.min_chunk_tiles, (span.num_tiles + most - 1) >> plan.max_chunks_log2);
}

// How long the prefill kernel takes for a sequence, in keys that can be read in that time.
__device__ inline float prefill_work(const DecodePlan& plan, const Span& span) {
  if (span.query_len <= plan.max_query_len) return 0.0f;
  const float query_len = static_cast<float>(span.query_len);
  const float keys = static_cast<float>(span.seq_len - span.begin) - query_len / 2;  // of a token
  return plan.beside.cost * query_len * keys;
}

// Shares of so many tiles beside so much prefill: some more than read as fast as the memory can be,
// for the CTAs do not end at once; fewer, each as fast as it can, where the prefill takes longer.
// All if the prefill is done sooner than other cuts cost, or if one of its CTAs takes longer than
// half of the reading: what counts is then how soon it starts.
__device__ inline uint32_t num_shares(const DecodePlan& plan, uint32_t tiles, float prefill) {
  constexpr float kLeast = 1.0f / 32;
  const float ratio = prefill / (static_cast<float>(tiles) * static_cast<float>(plan.tile_keys()));
  if (ratio < kLeast || 2.0f * ratio > plan.beside.rounds) return plan.num_shares;
  const float part = fminf(plan.beside.readers * fmaxf(1.46f - 0.71f * ratio, 0.71f), 1.0f);
  return max(static_cast<uint32_t>(part * static_cast<float>(plan.num_shares)), 1);
}

// Units cut into shares: share i begins at unit i * total / count, rounded down. A 32-bit division
// is 20 instructions, which at each launch come from memory too: quotients are estimated, and
// corrected.
struct Shares {
  uint32_t total;
  uint32_t count;          // that are not empty
  uint32_t count_inverse;  // 2^32 / count, rounded down
  uint32_t size;           // total / count, rounded down
  uint32_t rest;           // total - size * count

  // `prefill`: the sum of the sequences' prefill_work.
  __device__ static Shares of(uint32_t total, const DecodePlan& plan, float prefill) {
    uint32_t count = static_cast<uint32_t>(plan.num_shares), inverse = plan.num_shares_inverse;
    if (prefill > 0.0f) {
      count = num_shares(plan, total, prefill);
      inverse = UINT32_MAX / count;
    }
    if (total < count) return {total, total, 0, 1, 0};
    Shares shares{total, count, inverse, 0, 0};
    shares.size = shares.over_count(total);
    shares.rest = total - shares.size * count;
    return shares;
  }

  __device__ uint32_t begin_of(uint32_t share) const {
    return min(share * size + over_count(share * rest), total);
  }

  __device__ uint32_t share_of(uint32_t unit) const {
    const float estimate = __fdividef(static_cast<float>(unit) * count, static_cast<float>(total));
    uint32_t share = static_cast<uint32_t>(estimate);
#pragma unroll 1
    while (begin_of(share) > unit) --share;
#pragma unroll 1
    while (begin_of(share + 1) <= unit) ++share;
    return share;
  }

 private:
  // x / count, rounded down: the estimate is at most one too small.
  __device__ uint32_t over_count(uint32_t x) const {
    const uint32_t estimate = __umulhi(x, count_inverse);
    return x - estimate * count >= count ? estimate + 1 : estimate;
  }
};

// One CTA's share: units begin .. end-1; `seq` is the sequence of unit `begin`, and itself begins
// at unit `seq_begin`.
struct Share {
  Shares all;
  uint32_t index;
  uint32_t begin;
  uint32_t end;
  int32_t seq;
  uint32_t seq_begin;

  // Its sequence is still to be found.
  __device__ static Share of(const Shares& all, uint32_t index) {
    return {all, index, all.begin_of(index), all.begin_of(index + 1), 0, 0};
  }
};

// The share of this CTA where there are no more sequences than lanes: each warp finds it by itself.
__device__ inline Share find_share_of_few(const AttentionParams& params, const DecodePlan& plan,
                                          uint32_t index) {
  const int lane = threadIdx.x % kWarpSize;
  const bool present = lane < static_cast<int>(params.num_seqs);
  const Span span = present ? span_of(params, plan, lane) : Span{};
  const uint32_t units = span.num_tiles;
  const uint32_t before = warp_exclusive_sum(units, lane);
  const uint32_t total = __shfl_sync(0xffffffffu, before + units, kWarpSize - 1);
  const float prefill = plan.beside.cost > 0.0f ? warp_sum(prefill_work(plan, span)) : 0.0f;
  Share share = Share::of(Shares::of(total, plan, prefill), index);
  share.seq = warp_first(before <= share.begin && share.begin < before + units);
  share.seq_begin = __shfl_sync(0xffffffffu, before, share.seq);
  return share;
}

// The share of this CTA, by all kThreads threads of it: each adds up a run of sequences, and the
// one in whose run the share begins looks for the sequence.
template <int kThreads>
__device__ Share find_share(const AttentionParams& params, const DecodePlan& plan, uint32_t index) {
  if (params.num_seqs <= kWarpSize) return find_share_of_few(params, plan, index);
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ uint32_t warp_totals[kWarps];
  __shared__ float warp_prefill[kWarps];
  __shared__ uint32_t found[2];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int32_t num_seqs = static_cast<int32_t>(params.num_seqs);
  const int32_t run = (num_seqs + kThreads - 1) / kThreads;
  const int32_t first = min(static_cast<int32_t>(threadIdx.x) * run, num_seqs);
  const int32_t last = min(first + run, num_seqs);

  uint32_t mine = 0;
  float prefill_of_mine = 0.0f;
#pragma unroll 1
  for (int32_t seq = first; seq < last; ++seq) {
    const Span span = span_of(params, plan, seq);
    mine += span.num_tiles;
    prefill_of_mine += prefill_work(plan, span);
  }
  uint32_t before = warp_exclusive_sum(mine, lane);
  const float prefill_of_warp = plan.beside.cost > 0.0f ? warp_sum(prefill_of_mine) : 0.0f;
  if (lane == kWarpSize - 1) {
    warp_totals[warp] = before + mine;
    warp_prefill[warp] = prefill_of_warp;
  }
  __syncthreads();
  uint32_t total = 0;
  float prefill = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += warp_totals[i];
    total += warp_totals[i];
    prefill += warp_prefill[i];
  }
  Share share = Share::of(Shares::of(total, plan, prefill), index);
  if (share.begin == share.end) return share;
  if (before <= share.begin && share.begin < before + mine) {
    int32_t seq = first;
#pragma unroll 1
    for (;; ++seq) {
      const uint32_t units = span_of(params, plan, seq).num_tiles;
      if (share.begin < before + units) break;
      before += units;
    }
    found[0] = static_cast<uint32_t>(seq);
    found[1] = before;
  }
  __syncthreads();
  share.seq = static_cast<int32_t>(found[0]);
  share.seq_begin = found[1];
  return share;
}

// What a CTA is to do: a share of the keys, for the KV heads of a column.
struct Work {
  DecodePlan plan;  // by the cut that suits the lengths
  int32_t column;
  Share share;
};

// CTAs along x and y, so that no CTA has to divide: the columns and shares of the plan. What the
// other cut has more is put into rows after these.
inline Grid grid_of(const DecodePlan& plan) {
  const int64_t rows = ceil_div(plan.of_long.num_ctas(), plan.num_columns);
  return {plan.num_columns, std::max<int64_t>(plan.num_shares, rows)};
}

// The CTA's work, by all kThreads threads of it. A small batch is cut once more if it turns out to
// be long: to add up the lengths before would delay all others. CTAs that are too many for a cut
// find an empty share.
template <int kThreads>
__device__ Work find_work(const AttentionParams& params, const DecodePlan& plan) {
  const int32_t x = blockIdx.x, y = blockIdx.y;
  Work work{plan, x, find_share<kThreads>(params, plan, y)};
  if (work.share.all.total <= plan.max_tiles) return work;
  work.plan = plan_of_long(plan);
  const int32_t cta = y * static_cast<int32_t>(gridDim.x) + x;
  const int32_t index = quotient(cta, work.plan.num_columns);
  work.column = cta - index * work.plan.num_columns;
  work.share = find_share_of_few(params, work.plan, index);
  return work;
}

// Keys that are computed together, and what there is to know of them. A piece is what one CTA
// computes of one sequence.
struct Tile {
  Span span;
  int32_t first_key;
  uint32_t seq_begin;    // the first unit of the sequence
  uint32_t piece_begin;  // and of the piece
  bool ends_piece;
};

// A walk over the tiles of a share, the same in every thread.
class Walk {
 public:
  __device__ Walk(const AttentionParams& params, const DecodePlan& plan, const Share& share)
      : seq_(share.seq), unit_(share.begin), end_(share.end), seq_begin_(share.seq_begin) {
    enter(params, plan);
    tile_ = static_cast<int32_t>(unit_ - seq_begin_);
    if (chunk_ > 0) tile_ = quotient(tile_ + chunk_ - 1, chunk_) * chunk_;
    begin_piece(params, plan);
  }

  __device__ bool done() const { return unit_ >= end_; }
  __device__ int32_t seq() const { return seq_; }
  __device__ int32_t left() const { return piece_end_ - tile_; }  // tiles of this piece

  // The tile that comes `ahead` of the next one, of the same piece.
  __device__ Tile tile(const DecodePlan& plan, int32_t ahead) const {
    const int32_t index = (span_.begin >> plan.tile_keys_log2) + tile_ + ahead;
    return {span_, index << plan.tile_keys_log2, seq_begin_, unit_,
            tile_ + ahead + 1 == piece_end_};
  }

  // By `count` tiles of this piece.
  __device__ void advance(const AttentionParams& params, const DecodePlan& plan, int32_t count) {
    tile_ += count;
    if (tile_ == piece_end_) begin_piece(params, plan);
  }

 private:
  __device__ void enter(const AttentionParams& params, const DecodePlan& plan) {
    span_ = span_of(params, plan, seq_);
    chunk_ = plan.batch_invariant ? chunk_tiles(plan, span_) : 0;
  }

  // At `tile_`, or, where the sequence has ended, with the next one.
  __device__ void begin_piece(const AttentionParams& params, const DecodePlan& plan) {
    unit_ = seq_begin_ + min(tile_, span_.num_tiles);
    if (done()) return;
    if (tile_ >= span_.num_tiles) {
      seq_begin_ = unit_;
#pragma unroll 1
      do {
        ++seq_;
        enter(params, plan);
      } while (span_.num_tiles == 0);
      tile_ = 0;
    }
    const int32_t left = chunk_ > 0 ? chunk_ : static_cast<int32_t>(end_ - unit_);
    piece_end_ = min(span_.num_tiles, tile_ + left);
  }

  int32_t seq_;
  uint32_t unit_;  // the first one of the piece
  uint32_t end_;   // in the batch-invariant mode the last piece may go on after it
  uint32_t seq_begin_;
  Span span_{};
  int32_t tile_ = 0;
  int32_t piece_end_ = 0;
  int32_t chunk_ = 0;  // 0: pieces end where shares end
};

// One of the pieces that a sequence is put together from. Slots are where pieces are kept: a share
// has slot 2 i + 1 for the sequence that begins in it and goes on after it, and slot 2 i for the
// one that began before. In the batch-invariant mode these are groups of slots, one for each chunk,
// and all pieces of a sequence lie in a group of the share in which it begins: 2 i + 1 if it goes
// on after that share, else 2 i, which serves one sequence after the other.
struct Piece {
  int32_t index;
  int32_t count;
  int32_t first_slot;  // of piece 0
  int32_t second_slot;
  int32_t stride;     // from there on
  bool in_one_share;  // all of them

  // The piece that `tile` belongs to.
  __device__ static Piece of(const DecodePlan& plan, const Share& share, const Tile& tile) {
    const uint32_t begin = tile.seq_begin;
    const int32_t first = share.all.share_of(begin);
    if (plan.batch_invariant) {
      const int32_t chunk = chunk_tiles(plan, tile.span);
      const int32_t index = quotient(static_cast<int32_t>(tile.piece_begin - begin), chunk);
      const int32_t count = quotient(tile.span.num_tiles + chunk - 1, chunk);
      const uint32_t last_begin = begin + (count - 1) * chunk;
      const bool whole = last_begin < share.all.begin_of(first + 1);
      const int32_t slot = (2 * first + !whole) << plan.max_chunks_log2;
      return {index, count, slot, slot + 1, 1, whole};
    }
    const int32_t last = share.all.share_of(begin + tile.span.num_tiles - 1);
    const int32_t index = static_cast<int32_t>(share.index) - first;
    return {index, last - first + 1, 2 * first + 1, 2 * first + 2, 2, false};
  }

  __device__ int32_t slot(int32_t piece) const {
    return piece == 0 ? first_slot : second_slot + (piece - 1) * stride;
  }
};

}  // namespace paged_ops::cuda
