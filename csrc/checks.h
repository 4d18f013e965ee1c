// Tensors -> params: every check an operator makes of shapes, dtypes, devices and strides, once for
// both backends. What leaves here is safe to hand to a kernel, values on the device excepted.
#pragma once

#include "checker.h"
#include "params.h"

namespace paged_ops {

// The keyword arguments that all attention operators share.
struct AttentionOptions {
  const std::optional<double>& scale;
  bool causal;
  int64_t window;
  double softcap;
  const OptionalTensor& alibi_slopes;
  const OptionalTensor& sinks;
  const OptionalTensor& k_scale;
  const OptionalTensor& v_scale;
  bool batch_invariant;
};

// The result has neither out nor lse yet: see set_out and set_lse.
AttentionParams check_attention(const char* op, const Tensor& query, const Tensor& kv_cache,
                                const Tensor& block_table, const Tensor& seq_lens,
                                const OptionalTensor& query_start_loc,
                                const AttentionOptions& options);

// `out` as a caller hands it: checked against query and against everything that is read.
void check_out(const char* op, const Tensor& out, const Tensor& query,
               std::initializer_list<std::pair<const char*, const Tensor*>> read);

// `out` and `lse` of a shape and dtype that are known to be right.
void set_out(AttentionParams& params, const Tensor& out);
void set_lse(AttentionParams& params, const Tensor& lse);

AttentionParams check_paged_attention_v1(const Tensor& query, const Tensor& key_cache,
                                         const Tensor& value_cache, const Tensor& block_table,
                                         const Tensor& context_lens);

WriteKvParams check_write_kv(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                             const Tensor& slot_mapping, const OptionalTensor& k_scale,
                             const OptionalTensor& v_scale);

CopyBlocksParams check_copy_blocks(const Tensor& kv_cache, const Tensor& block_pairs);

// The result has no merged state yet: see set_merged.
MergeStatesParams check_merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                     const Tensor& lse_b);
void set_merged(MergeStatesParams& params, const Tensor& out, const Tensor& lse);

}  // namespace paged_ops
