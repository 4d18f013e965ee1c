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

// The result has neither out nor lse yet: see below.
AttentionParams check_attention(const char* op, const TensorView& query, const TensorView& kv_cache,
                                const TensorView& block_table, const TensorView& seq_lens,
                                const OptionalTensor& query_start_loc,
                                const AttentionOptions& options);

// `out` as a caller hands it: checked against query and against everything that is read.
void check_out(const char* op, const TensorView& out, const TensorView& query,
               std::initializer_list<std::pair<const char*, const TensorView*>> read);

void set_out(AttentionParams& params, const TensorView& out);

// Results as operators.h makes them: contiguous, of the query's dtype and of float32.
void set_new_out(AttentionParams& params, const Tensor& out);
void set_new_lse(AttentionParams& params, const Tensor& lse);

AttentionParams check_paged_attention_v1(const TensorView& query, const TensorView& key_cache,
                                         const TensorView& value_cache,
                                         const TensorView& block_table,
                                         const TensorView& context_lens);

WriteKvParams check_write_kv(const TensorView& key, const TensorView& value,
                             const TensorView& kv_cache, const TensorView& slot_mapping,
                             const OptionalTensor& k_scale, const OptionalTensor& v_scale);

CopyBlocksParams check_copy_blocks(const TensorView& kv_cache, const TensorView& block_pairs);

// The result has no merged state yet: see set_new_merged.
MergeStatesParams check_merge_states(const TensorView& out_a, const TensorView& lse_a,
                                     const TensorView& out_b, const TensorView& lse_b);
void set_new_merged(MergeStatesParams& params, const Tensor& out, const Tensor& lse);

}  // namespace paged_ops
