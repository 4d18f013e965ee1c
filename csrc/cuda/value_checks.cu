#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"
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

// One value of the argument `name`, which belongs to `owner` (a sequence, token or pair) number
// `index`.
struct Value {
  const char* op;
  const char* name;
  const char* owner;
  int64_t index;

  __device__ void require_in(int64_t low, int64_t high, int64_t value) const {
    if (value >= low && value <= high) return;
    printf("paged::%s: %s of %s %lld must be in [%lld, %lld], got %lld\n", op, name, owner,
           static_cast<long long>(index), static_cast<long long>(low), static_cast<long long>(high),
           static_cast<long long>(value));
    __trap();
  }
};

__device__ Value attention_value(const char* name, int64_t seq) {
  return {"attention", name, "sequence", seq};
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

// One CTA for each sequence: thread 0 the lengths, then all of them the blocks, which only lengths
// that are right make safe to read.
__global__ void check_attention_kernel(const __grid_constant__ AttentionParams params) {
  const int64_t seq = blockIdx.x;
  const Rows rows = rows_of(params, seq);
  const int64_t seq_len = params.seq_lens[seq];
  if (threadIdx.x == 0) {
    attention_value("query_start_loc", seq).require_in(0, params.num_tokens, rows.begin);
    attention_value("query_start_loc", seq + 1).require_in(rows.begin, params.num_tokens, rows.end);
    const int64_t capacity = params.max_blocks * params.block_size;
    attention_value("seq_lens", seq).require_in(0, capacity, seq_len);
  }
  __syncthreads();
  if (rows.begin == rows.end) return;  // nobody reads its blocks
  const int64_t first_position = seq_len - (rows.end - rows.begin);
  const bool limited = params.window >= 0 && params.window <= first_position;
  const int64_t first_key = limited ? first_position + 1 - params.window : 0;
  const int64_t num_blocks = (seq_len + params.block_size - 1) / params.block_size;
  for (int64_t i = first_key / params.block_size + threadIdx.x; i < num_blocks; i += kThreads) {
    attention_value("block_table", seq)
        .require_in(0, params.num_blocks - 1,
                    params.block_table[seq * params.block_table_stride + i]);
  }
}

__global__ void check_write_kv_kernel(const __grid_constant__ WriteKvParams params) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= params.num_tokens) return;
  const int64_t num_slots = params.num_blocks * params.block_size;
  Value{"write_kv", "slot_mapping", "token", token}.require_in(-1, num_slots - 1,
                                                               params.slot_mapping[token]);
}

__global__ void check_copy_blocks_kernel(const __grid_constant__ CopyBlocksParams params) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= 2 * params.num_pairs) return;
  Value{"copy_blocks", "block_pairs", "pair", index / 2}.require_in(0, params.num_blocks - 1,
                                                                    params.block_pairs[index]);
}

}  // namespace

void check_values(const AttentionParams& params, cudaStream_t stream) {
  if (!enabled()) return;
  launch("attention", check_attention_kernel, {params.num_seqs}, kThreads, stream, params);
}

void check_values(const WriteKvParams& params, cudaStream_t stream) {
  if (!enabled()) return;
  launch("write_kv", check_write_kv_kernel, {ceil_div(params.num_tokens, kThreads)}, kThreads,
         stream, params);
}

void check_values(const CopyBlocksParams& params, cudaStream_t stream) {
  if (!enabled()) return;
  launch("copy_blocks", check_copy_blocks_kernel, {ceil_div(2 * params.num_pairs, kThreads)},
         kThreads, stream, params);
}

}  // namespace paged_ops::cuda
