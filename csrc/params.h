// What a kernel is told: plain structs of pointers, strides and sizes, made by checks.cpp from
// tensors that have been checked. No torch from here down. Every stride is in elements, and the
// innermost dimension (head_size) always has stride 1.
#pragma once

#include <cstdint>

namespace paged_ops {

constexpr int kMaxHeadSize = 256;

enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

// One half (K or V) of the cache: element (block, slot, head, d) lies at
// data + block * stride_block + slot * stride_slot + head * stride_head + d.
template <typename Pointer>
struct CacheHalf {
  Pointer data;
  int64_t stride_block;
  int64_t stride_slot;
  int64_t stride_head;
};

// A scale that dequantises a float8 cache: one for all KV heads (stride 0) or one for each (stride
// 1).
struct Scale {
  const float* data;  // nullptr: 1.0
  int64_t stride;
};

struct AttentionParams {
  const void* query;  // [num_tokens, num_heads, head_size] of query_dtype
  int64_t query_stride_token;
  int64_t query_stride_head;
  void* out;  // [num_tokens, num_heads, head_size] of out_dtype
  int64_t out_stride_token;
  int64_t out_stride_head;
  float* lse;  // [num_tokens, num_heads], contiguous; nullptr: not wanted
  CacheHalf<const void*> key_cache;
  CacheHalf<const void*> value_cache;
  const int32_t* block_table;  // [num_seqs, max_blocks]
  int64_t block_table_stride;
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* query_start_loc;  // [num_seqs + 1]; nullptr: token i belongs to sequence i
  const float* alibi_slopes;       // [num_heads] or nullptr
  const float* sinks;              // [num_heads] or nullptr
  Scale k_scale;
  Scale v_scale;

  int64_t num_tokens;
  int64_t num_seqs;
  int64_t num_blocks;
  int64_t max_blocks;  // columns of block_table
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t block_size;

  float scale;
  float softcap;   // 0: none
  int64_t window;  // keys a query sees, its own included; -1: all
  bool causal;
  bool batch_invariant;  // a sequence's result must not depend on the rest of the batch

  DType query_dtype;
  DType cache_dtype;
  DType out_dtype;

  const char* op;             // what the messages of the host call this operator
  const char* seq_lens_name;  // and seq_lens

  int32_t group_size() const { return num_heads / num_kv_heads; }
};

struct WriteKvParams {
  const void* key;  // [num_tokens, num_kv_heads, head_size] of dtype
  int64_t key_stride_token;
  int64_t key_stride_head;
  const void* value;
  int64_t value_stride_token;
  int64_t value_stride_head;
  CacheHalf<void*> key_cache;  // of cache_dtype
  CacheHalf<void*> value_cache;
  const int64_t* slot_mapping;  // [num_tokens], block * block_size + offset, -1: skip
  Scale k_scale;                // what is stored is key / k_scale
  Scale v_scale;

  int64_t num_tokens;
  int64_t num_blocks;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t block_size;

  DType dtype;
  DType cache_dtype;
};

struct CopyBlocksParams {
  void* kv_cache;  // [num_blocks, 2, block_size, num_kv_heads, head_size]
  int64_t stride_block;
  int64_t stride_kv;
  int64_t stride_slot;
  int64_t stride_head;
  const int64_t* block_pairs;  // [num_pairs, 2], (source, destination), contiguous

  int64_t num_pairs;
  int64_t num_blocks;
  int32_t block_size;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t element_size;  // bytes
};

// One of the two states that are merged, and the result.
template <typename Pointer, typename LsePointer>
struct AttentionState {
  Pointer out;  // [num_tokens, num_heads, head_size] of dtype
  int64_t out_stride_token;
  int64_t out_stride_head;
  LsePointer lse;  // [num_tokens, num_heads]
  int64_t lse_stride_token;
  int64_t lse_stride_head;
};

struct MergeStatesParams {
  AttentionState<const void*, const float*> a;
  AttentionState<const void*, const float*> b;
  AttentionState<void*, float*> merged;

  int64_t num_tokens;
  int32_t num_heads;
  int32_t head_size;

  DType dtype;
};

}  // namespace paged_ops
