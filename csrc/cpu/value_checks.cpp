#include "value_checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_set>

#include "schedule.h"

namespace paged_ops::cpu {
namespace {

[[noreturn]] void fail(const char* op, const std::string& what, const std::string& expected,
                       int64_t got) {
  throw std::runtime_error(std::string("paged::") + op + ": " + what + " must be " + expected +
                           ", got " + std::to_string(got));
}

std::string at(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

// The blocks that the queries of one sequence can see; a window lets the first ones go unread.
void check_block_ids(const AttentionParams& params, int64_t seq, int64_t query_len) {
  const int64_t seq_len = params.seq_lens[seq];
  const int64_t first_position = std::max<int64_t>(seq_len - query_len, 0);
  const int64_t first_block =
      visible_keys(params, seq_len, first_position).begin / params.block_size;
  const int64_t end_block = (seq_len + params.block_size - 1) / params.block_size;
  const int32_t* row = params.block_table + seq * params.block_table_stride;
  for (int64_t i = first_block; i < end_block; ++i) {
    if (row[i] >= 0 && row[i] < params.num_blocks) continue;
    fail(params.op, "block_table[" + std::to_string(seq) + ", " + std::to_string(i) + "]",
         "a block id below " + std::to_string(params.num_blocks), row[i]);
  }
}

int64_t check_query_len(const AttentionParams& params, int64_t seq) {
  if (params.query_start_loc == nullptr) return 1;
  const int64_t begin = params.query_start_loc[seq], end = params.query_start_loc[seq + 1];
  if (begin < 0) fail(params.op, at("query_start_loc", seq), "0 or more", begin);
  if (end < begin) {
    fail(params.op, at("query_start_loc", seq + 1), "at least " + std::to_string(begin), end);
  }
  if (end > params.num_tokens) {
    fail(params.op, at("query_start_loc", seq + 1),
         "at most num_tokens=" + std::to_string(params.num_tokens), end);
  }
  return end - begin;
}

// Where there are no sequences, query_start_loc has this entry only.
void check_only_start(const AttentionParams& params) {
  if (params.query_start_loc == nullptr) return;
  const int64_t start = params.query_start_loc[0];
  if (start >= 0 && start <= params.num_tokens) return;
  fail(params.op, "query_start_loc[0]", "from 0 to num_tokens=" + std::to_string(params.num_tokens),
       start);
}

}  // namespace

void check_values(const AttentionParams& params) {
  if (params.num_seqs == 0) check_only_start(params);
  const int64_t capacity = params.max_blocks * params.block_size;
  for (int64_t seq = 0; seq < params.num_seqs; ++seq) {
    const int64_t seq_len = params.seq_lens[seq];
    if (seq_len < 0 || seq_len > capacity) {
      fail(params.op, at(params.seq_lens_name, seq),
           "from 0 to max_blocks * block_size = " + std::to_string(capacity), seq_len);
    }
    const int64_t query_len = check_query_len(params, seq);
    if (query_len > 0) check_block_ids(params, seq, query_len);
  }
}

void check_values(const WriteKvParams& params) {
  const int64_t num_slots = params.num_blocks * params.block_size;
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    if (slot >= -1 && slot < num_slots) continue;
    fail("write_kv", at("slot_mapping", token),
         "-1 (skip) or a slot below " + std::to_string(num_slots), slot);
  }
}

void check_values(const CopyBlocksParams& params) {
  std::unordered_set<int64_t> destinations;
  for (int64_t pair = 0; pair < params.num_pairs; ++pair) {
    for (int64_t end = 0; end < 2; ++end) {
      const int64_t block = params.block_pairs[2 * pair + end];
      if (block >= 0 && block < params.num_blocks) continue;
      fail("copy_blocks", "block_pairs[" + std::to_string(pair) + ", " + std::to_string(end) + "]",
           "a block id below " + std::to_string(params.num_blocks), block);
    }
    const int64_t destination = params.block_pairs[2 * pair + 1];
    if (!destinations.insert(destination).second) {
      fail("copy_blocks", at("block_pairs", pair), "a destination given once", destination);
    }
  }
  for (int64_t pair = 0; pair < params.num_pairs; ++pair) {
    const int64_t source = params.block_pairs[2 * pair];
    if (destinations.count(source) > 0) {
      fail("copy_blocks", at("block_pairs", pair), "a source that is no destination", source);
    }
  }
}

}  // namespace paged_ops::cpu
