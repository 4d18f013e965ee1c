// How a batch is cut into units of work. Where a sequence is cut depends on that sequence and on
// the model's sizes alone, never on the threads or on the rest of the batch, and the parts are put
// together in a fixed order: a sequence's result is the same, bit for bit, wherever and beside
// whatever it runs.
//
// - A query tile is some consecutive tokens of a sequence; its rows are their query heads of one KV
//   head.
// - A split is a range of keys; only few-token sequences are split, their partial results merged.
// - A unit is a query tile x a split x KV heads: all of them for few rows (decode walks the cache
//   as it lies in memory), one for many (prefill works out of the processor's cache).
#pragma once

#include <cstdint>

#include "../params.h"

namespace paged_ops::cpu {

// Keys are visited in tiles of at most this many.
constexpr int kTileKeys = 256;
// The stride of packed keys, an odd number of lines: no two rows meet in one set of a cache.
constexpr int kPackedStride = kTileKeys + 16;
constexpr int kKeyStep = 32;  // keys that matrix products take at once, at most

constexpr int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The stride of rows of head_size floats: of packed values, accumulators and partial results.
constexpr int64_t padded_head_size(int64_t head_size) { return round_up(head_size, 32); }

// How much of a sequence an instruction set works on at once, by what its processors' caches hold.
struct Blocking {
  int64_t tile_rows;   // of a query tile: K and V are repacked once for so many
  int32_t tile_keys;   // at most kTileKeys; splits start at multiples of it
  int64_t tile_bytes;  // K and V of a tile for few rows, in a second-level cache beside the next
};
inline constexpr Blocking kVectorBlocking{128, 64, 1 << 17};  // where all is done in vectors

// The keys that a query token sees: [begin, end).
struct KeyRange {
  int64_t begin;
  int64_t end;
};
inline KeyRange visible_keys(const AttentionParams& params, int64_t seq_len, int64_t position) {
  if (position < 0) return {0, 0};
  const int64_t oldest = params.window < 0 ? 0 : position - params.window + 1;
  const int64_t begin = oldest > 0 ? oldest : 0;
  const int64_t end = params.causal && position + 1 < seq_len ? position + 1 : seq_len;
  return {begin < end ? begin : end, end};
}

// How one sequence is cut.
struct Cut {
  int64_t first_token;  // its row of query
  int64_t query_len;
  int64_t seq_len;
  int64_t tile_tokens;
  int64_t num_tiles;
  int32_t unit_kv_heads;  // KV heads of one unit
  int32_t tile_keys;
  KeyRange keys;  // of all its tokens together, from a multiple of Blocking::tile_keys
  int64_t split_keys;
  int64_t num_splits;

  int64_t num_units(const AttentionParams& params) const {
    return num_tiles * (params.num_kv_heads / unit_kv_heads) * num_splits;
  }
};

struct Unit {
  int64_t seq;
  int64_t seq_len;
  int64_t first_token;  // its row of query
  int64_t first_position;
  int64_t num_tokens;
  int32_t first_kv_head;
  int32_t num_kv_heads;
  int32_t tile_keys;
  KeyRange keys;
  int64_t num_splits;
  int64_t
      first_partial;  // of the first token's first head; the next head's lies num_splits further
};

// Unnormalised results of splits: out = sum p_j v_j, max of the base-2 scores, sum of p_j.
struct Partials {
  float* out;  // [num_partials, padded_head_size]
  float* max;
  float* sum;
};

class Schedule {
 public:
  Schedule(const AttentionParams& params, const Blocking& blocking);

  Cut cut_sequence(int64_t seq) const;
  int64_t num_units() const { return first_unit_[params_.num_seqs]; }
  Unit unit(int64_t index) const;

  // The first partial result of a sequence; none if it is not split.
  int64_t first_partial(int64_t seq) const { return first_partial_[seq]; }
  bool has_splits() const { return first_partial_[params_.num_seqs] > 0; }
  const Partials& partials() const { return partials_; }

  // How many threads the work is worth.
  int64_t max_threads() const { return max_threads_; }

 private:
  void allocate_partials(int64_t num_partials);

  const AttentionParams& params_;
  const Blocking blocking_;
  int64_t* first_unit_;     // [num_seqs + 1]
  int64_t* first_partial_;  // [num_seqs + 1]
  Partials partials_;
  int64_t max_threads_;
};

}  // namespace paged_ops::cpu
