#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "ptx.cuh"
#include "value_checks.h"

namespace paged_ops::cuda {
namespace {

constexpr int kThreads = 128;

bool enabled() {
  static const bool on = [] {
    const char* const wish = std::getenv("PAGED_OPS_CHECK");
    return wish != nullptr && std::strcmp(wish, "1") == 0;
  }();
  return on;
}

// The words are those of the CPU's checks, but paged_attention_v1 and its context_lens go by the
// names that `attention` has. Every number in `message` is a %lld.
template <typename... Numbers>
__device__ void require(bool condition, const char* message, Numbers... numbers) {
  if (condition) return;
  printf(message, static_cast<long long>(numbers)...);
  __trap();
}

// The rows of the query that belong to a sequence.
struct Rows {
  int64_t begin;
  int64_t end;
};

__device__ Rows rows_of(const AttentionParams& params, int64_t seq) {
  if (params.query_start_loc == nullptr) return {seq, seq + 1};
  return {params.query_start_loc[seq], params.query_start_loc[seq + 1]};
}

__device__ void check_only_start(const AttentionParams& params) {
  if (params.query_start_loc == nullptr) return;
  const int64_t start = params.query_start_loc[0];
  require(start >= 0 && start <= params.num_tokens,
          "paged::attention: query_start_loc[0] must be from 0 to num_tokens=%lld, got %lld\n",
          params.num_tokens, start);
}

__device__ void check_lengths(const AttentionParams& params, int64_t seq, const Rows& rows,
                              int64_t seq_len) {
  const int64_t capacity = params.max_blocks * params.block_size;
  require(seq_len >= 0 && seq_len <= capacity,
          "paged::attention: seq_lens[%lld] must be from 0 to max_blocks * block_size = %lld, got "
          "%lld\n",
          seq, capacity, seq_len);
  require(rows.begin >= 0, "paged::attention: query_start_loc[%lld] must be 0 or more, got %lld\n",
          seq, rows.begin);
  require(rows.end >= rows.begin,
          "paged::attention: query_start_loc[%lld] must be at least %lld, got %lld\n", seq + 1,
          rows.begin, rows.end);
  require(rows.end <= params.num_tokens,
          "paged::attention: query_start_loc[%lld] must be at most num_tokens=%lld, got %lld\n",
          seq + 1, params.num_tokens, rows.end);
}

// One CTA for each sequence: one thread checks the lengths, which have to be right before the
// others may read the row of the block table. A window lets the first blocks go unread. Without a
// sequence, one CTA checks where the rows that belong to none begin.
__global__ void check_attention_kernel(const __grid_constant__ AttentionParams params) {
  wait_for_previous_kernel();
  const int64_t seq = blockIdx.x;
  if (seq == params.num_seqs) return check_only_start(params);
  const Rows rows = rows_of(params, seq);
  const int64_t seq_len = params.seq_lens[seq];
  if (threadIdx.x == 0) check_lengths(params, seq, rows, seq_len);
  __syncthreads();
  if (rows.begin == rows.end) return;

  const int64_t first_position = seq_len - (rows.end - rows.begin);
  const bool limited = params.window >= 0 && params.window <= first_position;
  const int64_t first_key = limited ? first_position + 1 - params.window : 0;
  const int64_t num_blocks = (seq_len + params.block_size - 1) / params.block_size;
  const int32_t* const row = params.block_table + seq * params.block_table_stride;
  for (int64_t i = first_key / params.block_size + threadIdx.x; i < num_blocks; i += kThreads) {
    require(row[i] >= 0 && row[i] < params.num_blocks,
            "paged::attention: block_table[%lld, %lld] must be a block id below %lld, got %lld\n",
            seq, i, params.num_blocks, row[i]);
  }
}

__global__ void check_write_kv_kernel(const __grid_constant__ WriteKvParams params) {
  wait_for_previous_kernel();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= params.num_tokens) return;
  const int64_t slot = params.slot_mapping[token];
  const int64_t num_slots = params.num_blocks * params.block_size;
  require(slot >= -1 && slot < num_slots,
          "paged::write_kv: slot_mapping[%lld] must be -1 (skip) or a slot below %lld, got %lld\n",
          token, num_slots, slot);
}

__global__ void check_copy_blocks_kernel(const __grid_constant__ CopyBlocksParams params) {
  wait_for_previous_kernel();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= 2 * params.num_pairs) return;
  const int64_t block = params.block_pairs[index];
  require(block >= 0 && block < params.num_blocks,
          "paged::copy_blocks: block_pairs[%lld, %lld] must be a block id below %lld, got %lld\n",
          index / 2, index % 2, params.num_blocks, block);
  for (int64_t pair = 0; pair < params.num_pairs; ++pair) {
    const int64_t end = 2 * pair + 1;
    if (params.block_pairs[end] != block || end == index) continue;
    require(index % 2 == 0,
            "paged::copy_blocks: block_pairs[%lld] must be a destination given once, got %lld\n",
            pair, block);
    require(index % 2 == 1,
            "paged::copy_blocks: block_pairs[%lld] must be a source that is no destination, got "
            "%lld\n",
            index / 2, block);
  }
}

}  // namespace

void check_values(const AttentionParams& params, cudaStream_t stream) {
  if (!enabled()) return;
  const int64_t num_ctas = std::max<int64_t>(params.num_seqs, 1);
  launch<check_attention_kernel>("attention", {num_ctas}, kThreads, stream, params);
}

void check_values(const WriteKvParams& params, cudaStream_t stream) {
  if (!enabled()) return;
  launch<check_write_kv_kernel>("write_kv", {ceil_div(params.num_tokens, kThreads)}, kThreads,
                                stream, params);
}

void check_values(const CopyBlocksParams& params, cudaStream_t stream) {
  if (!enabled()) return;
  launch<check_copy_blocks_kernel>("copy_blocks", {ceil_div(2 * params.num_pairs, kThreads)},
                                   kThreads, stream, params);
}

}  // namespace paged_ops::cuda
