// What each operator does, once for both backends: read the arguments, check, allocate, run. A
// Backend has a static `run(params, device)` for each params struct.
#pragma once

#include <utility>

#include "boxed_call.h"
#include "checks.h"

namespace paged_ops {

// In braces, which unlike an argument list are evaluated in order.
inline AttentionArguments read_attention_arguments(BoxedCall& call) {
  return {/*query=*/call.next_tensor(),
          /*kv_cache=*/call.next_tensor(),
          /*block_table=*/call.next_tensor(),
          /*seq_lens=*/call.next_tensor(),
          /*query_start_loc=*/call.next_optional_tensor(),
          /*scale=*/call.next<std::optional<double>>(),
          /*causal=*/call.next<bool>(),
          /*window=*/call.next<int64_t>(),
          /*softcap=*/call.next<double>(),
          /*alibi_slopes=*/call.next_optional_tensor(),
          /*sinks=*/call.next_optional_tensor(),
          /*k_scale=*/call.next_optional_tensor(),
          /*v_scale=*/call.next_optional_tensor(),
          /*batch_invariant=*/call.next<bool>()};
}

inline OwnedTensor new_out(const TensorArgument& query) {
  return new_tensor({query.sizes[0], query.sizes[1], query.sizes[2]}, query.dtype_code,
                    query.device);
}

inline OwnedTensor new_lse(const TensorArgument& query) {
  return new_tensor({query.sizes[0], query.sizes[1]}, aoti_torch_dtype_float32(), query.device);
}

template <typename Backend>
void attention(BoxedCall& call) {
  const AttentionArguments args = read_attention_arguments(call);
  AttentionParams params = check_attention("attention", args);
  OwnedTensor out = new_out(args.query);
  set_new_out(params, out);
  Backend::run(params, args.query.device);
  call.put(std::move(out));
}

template <typename Backend>
void attention_lse(BoxedCall& call) {
  const AttentionArguments args = read_attention_arguments(call);
  AttentionParams params = check_attention("attention_lse", args);
  OwnedTensor out = new_out(args.query), lse = new_lse(args.query);
  set_new_out(params, out);
  set_new_lse(params, lse);
  Backend::run(params, args.query.device);
  call.put(std::move(out));
  call.put(std::move(lse));
}

template <typename Backend>
void attention_out(BoxedCall& call) {
  const AttentionArguments args = read_attention_arguments(call);
  const TensorArgument out = call.next_tensor();
  AttentionParams params = check_attention("attention_out", args);
  check_out("attention_out", out, args.query,
            {{"query", &args.query}, {"kv_cache", &args.kv_cache}});
  set_out(params, out);
  Backend::run(params, args.query.device);
}

template <typename Backend>
void paged_attention_v1(BoxedCall& call) {
  const TensorArgument out = call.next_tensor(), query = call.next_tensor(),
                       key_cache = call.next_tensor(), value_cache = call.next_tensor(),
                       block_table = call.next_tensor(), context_lens = call.next_tensor();
  AttentionParams params =
      check_paged_attention_v1(query, key_cache, value_cache, block_table, context_lens);
  check_out("paged_attention_v1", out, query,
            {{"query", &query}, {"key_cache", &key_cache}, {"value_cache", &value_cache}});
  set_out(params, out);
  Backend::run(params, query.device);
}

template <typename Backend>
void write_kv(BoxedCall& call) {
  const TensorArgument key = call.next_tensor(), value = call.next_tensor(),
                       kv_cache = call.next_tensor(), slot_mapping = call.next_tensor(),
                       k_scale = call.next_optional_tensor(), v_scale = call.next_optional_tensor();
  Backend::run(check_write_kv(key, value, kv_cache, slot_mapping, k_scale, v_scale),
               kv_cache.device);
}

template <typename Backend>
void copy_blocks(BoxedCall& call) {
  const TensorArgument kv_cache = call.next_tensor(), block_pairs = call.next_tensor();
  Backend::run(check_copy_blocks(kv_cache, block_pairs), kv_cache.device);
}

template <typename Backend>
void merge_states(BoxedCall& call) {
  const TensorArgument out_a = call.next_tensor(), lse_a = call.next_tensor(),
                       out_b = call.next_tensor(), lse_b = call.next_tensor();
  MergeStatesParams params = check_merge_states(out_a, lse_a, out_b, lse_b);
  OwnedTensor out = new_out(out_a), lse = new_lse(out_a);
  set_new_merged(params, out, lse);
  Backend::run(params, out_a.device);
  call.put(std::move(out));
  call.put(std::move(lse));
}

template <typename Backend>
void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("attention", boxed<attention<Backend>>);
  m.impl("attention_lse", boxed<attention_lse<Backend>>);
  m.impl("attention_out", boxed<attention_out<Backend>>);
  m.impl("write_kv", boxed<write_kv<Backend>>);
  m.impl("copy_blocks", boxed<copy_blocks<Backend>>);
  m.impl("merge_states", boxed<merge_states<Backend>>);
  m.impl("paged_attention_v1", boxed<paged_attention_v1<Backend>>);
}

}  // namespace paged_ops
