// What each operator does, once for both backends: check, allocate, run. A Backend has a static
// `run(params, anchor)` for each params struct; `anchor` is a tensor on the device to run on.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <tuple>

#include "checks.h"

namespace paged_ops {

// Contiguous tensors where `query` is, past the dispatcher, which would cost a microsecond.
inline Tensor new_tensor(const TensorView& query, int64_t dims, const int64_t* strides,
                         int32_t dtype_code) {
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(dims, query.sizes.data(), strides, dtype_code, query.device.type,
                               query.device.index, &made) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("paged_ops: no memory for the result");
  }
  return Tensor(made);
}

inline Tensor new_out(const TensorView& query) {
  const int64_t strides[] = {query.sizes[1] * query.sizes[2], query.sizes[2], 1};
  return new_tensor(query, 3, strides, query.dtype_code);
}

inline Tensor new_lse(const TensorView& query) {
  const int64_t strides[] = {query.sizes[1], 1};
  return new_tensor(query, 2, strides, aoti_torch_dtype_float32());
}

template <typename Backend>
Tensor attention(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                 const Tensor& seq_lens, const OptionalTensor& query_start_loc,
                 const std::optional<double>& scale, bool causal, int64_t window, double softcap,
                 const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                 const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                 bool batch_invariant) {
  const TensorView query_view(query);
  AttentionParams params = check_attention(
      "attention", query_view, kv_cache, block_table, seq_lens, query_start_loc,
      {scale, causal, window, softcap, alibi_slopes, sinks, k_scale, v_scale, batch_invariant});
  const Tensor out = new_out(query_view);
  set_new_out(params, out);
  Backend::run(params, query);
  return out;
}

template <typename Backend>
std::tuple<Tensor, Tensor> attention_lse(
    const Tensor& query, const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_lens,
    const OptionalTensor& query_start_loc, const std::optional<double>& scale, bool causal,
    int64_t window, double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale, bool batch_invariant) {
  const TensorView query_view(query);
  AttentionParams params = check_attention(
      "attention_lse", query_view, kv_cache, block_table, seq_lens, query_start_loc,
      {scale, causal, window, softcap, alibi_slopes, sinks, k_scale, v_scale, batch_invariant});
  const Tensor out = new_out(query_view);
  const Tensor lse = new_lse(query_view);
  set_new_out(params, out);
  set_new_lse(params, lse);
  Backend::run(params, query);
  return {out, lse};
}

template <typename Backend>
void attention_out(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                   const Tensor& seq_lens, const OptionalTensor& query_start_loc,
                   const std::optional<double>& scale, bool causal, int64_t window, double softcap,
                   const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                   const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                   bool batch_invariant, const Tensor& out) {
  const TensorView query_view(query), cache_view(kv_cache), out_view(out);
  AttentionParams params = check_attention(
      "attention_out", query_view, cache_view, block_table, seq_lens, query_start_loc,
      {scale, causal, window, softcap, alibi_slopes, sinks, k_scale, v_scale, batch_invariant});
  check_out("attention_out", out_view, query_view,
            {{"query", &query_view}, {"kv_cache", &cache_view}});
  set_out(params, out_view);
  Backend::run(params, query);
}

template <typename Backend>
void paged_attention_v1(const Tensor& out, const Tensor& query, const Tensor& key_cache,
                        const Tensor& value_cache, const Tensor& block_table,
                        const Tensor& context_lens) {
  const TensorView query_view(query), key_view(key_cache), value_view(value_cache), out_view(out);
  AttentionParams params =
      check_paged_attention_v1(query_view, key_view, value_view, block_table, context_lens);
  check_out("paged_attention_v1", out_view, query_view,
            {{"query", &query_view}, {"key_cache", &key_view}, {"value_cache", &value_view}});
  set_out(params, out_view);
  Backend::run(params, query);
}

template <typename Backend>
void write_kv(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
              const Tensor& slot_mapping, const OptionalTensor& k_scale,
              const OptionalTensor& v_scale) {
  Backend::run(check_write_kv(key, value, kv_cache, slot_mapping, k_scale, v_scale), kv_cache);
}

template <typename Backend>
void copy_blocks(const Tensor& kv_cache, const Tensor& block_pairs) {
  Backend::run(check_copy_blocks(kv_cache, block_pairs), kv_cache);
}

template <typename Backend>
std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b) {
  const TensorView view_a(out_a);
  MergeStatesParams params = check_merge_states(view_a, lse_a, out_b, lse_b);
  const Tensor out = new_out(view_a);
  const Tensor lse = new_lse(view_a);
  set_new_merged(params, out, lse);
  Backend::run(params, out_a);
  return {out, lse};
}

template <typename Backend>
void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("attention", TORCH_BOX(attention<Backend>));
  m.impl("attention_lse", TORCH_BOX(attention_lse<Backend>));
  m.impl("attention_out", TORCH_BOX(attention_out<Backend>));
  m.impl("write_kv", TORCH_BOX(write_kv<Backend>));
  m.impl("copy_blocks", TORCH_BOX(copy_blocks<Backend>));
  m.impl("merge_states", TORCH_BOX(merge_states<Backend>));
  m.impl("paged_attention_v1", TORCH_BOX(paged_attention_v1<Backend>));
}

}  // namespace paged_ops
