// Where the keys and values of one sequence lie.
#pragma once

#include <cstdint>

#include "../params.h"
#include "warp.cuh"

namespace paged_ops::cuda {

// The keys and values of one sequence in one KV head.
template <typename Cache>
struct PagedKv {
  const int32_t* blocks;  // the sequence's row of the block table
  int32_t block_size;
  const Cache* key;  // of slot 0 of block 0
  const Cache* value;
  int64_t key_stride_block;
  int64_t key_stride_slot;
  int64_t value_stride_block;
  int64_t value_stride_slot;

  __device__ static PagedKv of_head(const AttentionParams& params, int64_t seq, int kv_head) {
    const auto& key = params.key_cache;
    const auto& value = params.value_cache;
    return {params.block_table + seq * params.block_table_stride,
            params.block_size,
            static_cast<const Cache*>(key.data) + kv_head * key.stride_head,
            static_cast<const Cache*>(value.data) + kv_head * value.stride_head,
            key.stride_block,
            key.stride_slot,
            value.stride_block,
            value.stride_slot};
  }

  struct Token {
    const Cache* key;  // [head_size]
    const Cache* value;
  };

  // Reads the block table, so only for a token that is there. A cache may hold more than 2^31
  // elements: the block and the slot have to be 64 bits wide before they meet a stride.
  __device__ Token token(int32_t index) const {
    const int64_t block = blocks[index / block_size];
    const int64_t slot = index % block_size;
    return {key + block * key_stride_block + slot * key_stride_slot,
            value + block * value_stride_block + slot * value_stride_slot};
  }
};

}  // namespace paged_ops::cuda
