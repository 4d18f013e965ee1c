#include "schedule.h"

#include <algorithm>

#include "threads.h"

namespace paged_ops::cpu {
namespace {

constexpr int64_t kFewRows = 32;          // up to here reading the cache costs more than arithmetic
constexpr int64_t kStateBytes = 1 << 19;  // accumulators that stay in a second-level cache
constexpr int64_t kSplitKeys = 512;       // few rows: about two megabytes of cache
constexpr int64_t kSplitKeysManyRows = 2048;
constexpr int64_t kMaxSplits = 64;            // bounds the memory of the partial results
constexpr int64_t kThreadElements = 1 << 15;  // elements of K and V that pay for waking a thread

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat8E4M3:
      return 1;
  }
  return 4;
}

int32_t choose_tile_keys(const AttentionParams& params, const Blocking& blocking) {
  const int64_t token_bytes =
      2 * int64_t{params.num_kv_heads} * params.head_size * element_size(params.cache_dtype);
  int32_t tile_keys = blocking.tile_keys;
  while (tile_keys > 16 && tile_keys * token_bytes > blocking.tile_bytes) tile_keys /= 2;
  return tile_keys;
}

// The keys that tokens at positions [first, last] see between them.
KeyRange keys_between(const AttentionParams& params, int64_t seq_len, int64_t first, int64_t last) {
  if (last < 0) return {0, 0};
  return {visible_keys(params, seq_len, std::max<int64_t>(first, 0)).begin,
          visible_keys(params, seq_len, last).end};
}

void choose_splits(Cut& cut, const Blocking& blocking, bool few_rows) {
  const int64_t num_keys = cut.keys.end - cut.keys.begin;
  cut.split_keys = std::max<int64_t>(num_keys, 1);
  if (few_rows || cut.num_tiles == 1) {
    const int64_t shortest = few_rows ? kSplitKeys : kSplitKeysManyRows;
    cut.split_keys =
        std::max(shortest, round_up((num_keys + kMaxSplits - 1) / kMaxSplits, blocking.tile_keys));
  }
  cut.num_splits = std::max<int64_t>((num_keys + cut.split_keys - 1) / cut.split_keys, 1);
}

}  // namespace

Cut Schedule::cut_sequence(int64_t seq) const {
  const AttentionParams& params = params_;
  const Blocking& blocking = blocking_;
  Cut cut{};
  const int32_t* const start = params.query_start_loc;
  cut.first_token = start == nullptr ? seq : start[seq];
  cut.query_len = start == nullptr ? 1 : start[seq + 1] - start[seq];
  cut.seq_len = params.seq_lens[seq];

  const int64_t group_size = params.group_size();
  cut.tile_tokens = std::max<int64_t>(blocking.tile_rows / group_size, 1);
  cut.num_tiles = (cut.query_len + cut.tile_tokens - 1) / cut.tile_tokens;
  const int64_t rows = std::min(cut.query_len, cut.tile_tokens) * group_size;
  const int64_t state_bytes =
      rows * params.num_kv_heads * padded_head_size(params.head_size) * int64_t{sizeof(float)};
  const bool few_rows = rows <= kFewRows && state_bytes <= kStateBytes;
  cut.unit_kv_heads = few_rows ? params.num_kv_heads : 1;
  cut.tile_keys = few_rows ? choose_tile_keys(params, blocking) : blocking.tile_keys;

  cut.keys = keys_between(params, cut.seq_len, cut.seq_len - cut.query_len, cut.seq_len - 1);
  cut.keys.begin = cut.keys.begin / blocking.tile_keys * blocking.tile_keys;
  choose_splits(cut, blocking, few_rows);
  return cut;
}

Schedule::Schedule(const AttentionParams& params, const Blocking& blocking)
    : params_(params), blocking_(blocking) {
  const int64_t num_bounds = params.num_seqs + 1;
  first_unit_ =
      static_cast<int64_t*>(scratch(Scratch::kSchedule, 2 * num_bounds * sizeof(int64_t)));
  first_partial_ = first_unit_ + num_bounds;
  first_unit_[0] = first_partial_[0] = 0;
  int64_t work = 0;
  for (int64_t seq = 0; seq < params.num_seqs; ++seq) {
    const Cut cut = cut_sequence(seq);
    const int64_t num_partials =
        cut.num_splits > 1 ? cut.query_len * params.num_heads * cut.num_splits : 0;
    first_unit_[seq + 1] = first_unit_[seq] + cut.num_units(params);
    first_partial_[seq + 1] = first_partial_[seq] + num_partials;
    work += cut.num_tiles * (cut.keys.end - cut.keys.begin) * 2 * params.num_kv_heads *
            params.head_size;
  }
  max_threads_ = 1 + work / kThreadElements;
  allocate_partials(first_partial_[params.num_seqs]);
}

void Schedule::allocate_partials(int64_t num_partials) {
  const int64_t row = padded_head_size(params_.head_size);
  partials_.out =
      static_cast<float*>(scratch(Scratch::kPartials, num_partials * (row + 2) * sizeof(float)));
  partials_.max = partials_.out + num_partials * row;
  partials_.sum = partials_.max + num_partials;
}

Unit Schedule::unit(int64_t index) const {
  const int64_t seq =
      std::upper_bound(first_unit_, first_unit_ + params_.num_seqs, index) - first_unit_ - 1;
  const Cut cut = cut_sequence(seq);
  int64_t rest = index - first_unit_[seq];
  const int64_t split = rest % cut.num_splits;
  rest /= cut.num_splits;
  const int64_t tile = rest % cut.num_tiles, first_in_seq = tile * cut.tile_tokens;

  Unit unit{};
  unit.seq = seq;
  unit.seq_len = cut.seq_len;
  unit.first_token = cut.first_token + first_in_seq;
  unit.first_position = cut.seq_len - cut.query_len + first_in_seq;
  unit.num_tokens = std::min(cut.tile_tokens, cut.query_len - first_in_seq);
  unit.first_kv_head = static_cast<int32_t>(rest / cut.num_tiles) * cut.unit_kv_heads;
  unit.num_kv_heads = cut.unit_kv_heads;
  unit.tile_keys = cut.tile_keys;
  unit.keys = keys_between(params_, cut.seq_len, unit.first_position,
                           unit.first_position + unit.num_tokens - 1);
  const int64_t split_begin = cut.keys.begin + split * cut.split_keys;
  unit.keys.begin = std::max(unit.keys.begin, split_begin);
  unit.keys.end = std::min(unit.keys.end, split_begin + cut.split_keys);
  unit.num_splits = cut.num_splits;
  unit.first_partial =
      first_partial_[seq] + first_in_seq * params_.num_heads * cut.num_splits + split;
  return unit;
}

}  // namespace paged_ops::cpu
