// What each operator does, once for both backends: check, allocate, run. A Backend has a static
// `run(params, anchor)` for each params struct; `anchor` is a tensor on the device to run on.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <tuple>

#include "checks.h"

namespace paged_ops {

// Contiguous tensors where `query` is, past the dispatcher, which would cost a microsecond.
inline Tensor new_tensor(const Tensor& query, int64_t dims, const int64_t* strides, int32_t dtype) {
  int32_t device_type = 0;
  AtenTensorHandle made = nullptr;
  if (aoti_torch_get_device_type(query.get(), &device_type) != AOTI_TORCH_SUCCESS ||
      aoti_torch_empty_strided(dims, query.sizes().data(), strides, dtype, device_type,
                               query.get_device_index(), &made) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("paged_ops: no memory for the result");
  }
  return Tensor(made);
}

inline Tensor new_out(const Tensor& query) {
  const auto sizes = query.sizes();
  const int64_t strides[] = {sizes[1] * sizes[2], sizes[2], 1};
  int32_t dtype = 0;
  if (aoti_torch_get_dtype(query.get(), &dtype) != AOTI_TORCH_SUCCESS) {
    throw std::logic_error("paged_ops: a tensor without a dtype; please report this");
  }
  return new_tensor(query, 3, strides, dtype);
}

inline Tensor new_lse(const Tensor& query) {
  const int64_t strides[] = {query.size(1), 1};
  return new_tensor(query, 2, strides, aoti_torch_dtype_float32());
}

template <typename Backend>
Tensor attention(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                 const Tensor& seq_lens, const OptionalTensor& query_start_loc,
                 const std::optional<double>& scale, bool causal, int64_t window, double softcap,
                 const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                 const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                 bool batch_invariant) {
  AttentionParams params = check_attention(
      "attention", query, kv_cache, block_table, seq_lens, query_start_loc,
      {scale, causal, window, softcap, alibi_slopes, sinks, k_scale, v_scale, batch_invariant});
  const Tensor out = new_out(query);
  set_out(params, out);
  Backend::run(params, query);
  return out;
}

template <typename Backend>
std::tuple<Tensor, Tensor> attention_lse(
    const Tensor& query, const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_lens,
    const OptionalTensor& query_start_loc, const std::optional<double>& scale, bool causal,
    int64_t window, double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale, bool batch_invariant) {
  AttentionParams params = check_attention(
      "attention_lse", query, kv_cache, block_table, seq_lens, query_start_loc,
      {scale, causal, window, softcap, alibi_slopes, sinks, k_scale, v_scale, batch_invariant});
  const Tensor out = new_out(query);
  const Tensor lse = new_lse(query);
  set_out(params, out);
  set_lse(params, lse);
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
  AttentionParams params = check_attention(
      "attention_out", query, kv_cache, block_table, seq_lens, query_start_loc,
      {scale, causal, window, softcap, alibi_slopes, sinks, k_scale, v_scale, batch_invariant});
  check_out("attention_out", out, query, {{"query", &query}, {"kv_cache", &kv_cache}});
  set_out(params, out);
  Backend::run(params, query);
}

template <typename Backend>
void paged_attention_v1(const Tensor& out, const Tensor& query, const Tensor& key_cache,
                        const Tensor& value_cache, const Tensor& block_table,
                        const Tensor& context_lens) {
  AttentionParams params =
      check_paged_attention_v1(query, key_cache, value_cache, block_table, context_lens);
  check_out("paged_attention_v1", out, query,
            {{"query", &query}, {"key_cache", &key_cache}, {"value_cache", &value_cache}});
  set_out(params, out);
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
  MergeStatesParams params = check_merge_states(out_a, lse_a, out_b, lse_b);
  const Tensor out = new_out(out_a);
  const Tensor lse = new_lse(out_a);
  set_merged(params, out, lse);
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
