// Tensors -> params: every check an operator makes of shapes, dtypes, devices and strides, once for
// both backends. What leaves here is safe to hand to a kernel, values on the device excepted.
#pragma once

#include <optional>
#include <utility>

#include "checker.h"
#include "params.h"

namespace paged_ops {

// What all attention operators take, in the order of their schemas.
struct AttentionArguments {
  TensorArgument query;
  TensorArgument kv_cache;
  TensorArgument block_table;
  TensorArgument seq_lens;
  TensorArgument query_start_loc;
  std::optional<double> scale;
  bool causal;
  int64_t window;
  double softcap;
  TensorArgument alibi_slopes;
  TensorArgument sinks;
  TensorArgument k_scale;
  TensorArgument v_scale;
  bool batch_invariant;
};

// The result has neither out nor lse yet: see below.
AttentionParams check_attention(const char* op, const AttentionArguments& args);

// `out` as a caller hands it: checked against query and against everything that is read.
void check_out(const char* op, const TensorArgument& out, const TensorArgument& query,
               std::initializer_list<std::pair<const char*, const TensorArgument*>> read);

void set_out(AttentionParams& params, const TensorArgument& out);

// Results as operators.h makes them: contiguous, of the query's dtype and of float32.
void set_new_out(AttentionParams& params, const OwnedTensor& out);
void set_new_lse(AttentionParams& params, const OwnedTensor& lse);

AttentionParams check_paged_attention_v1(const TensorArgument& query,
                                         const TensorArgument& key_cache,
                                         const TensorArgument& value_cache,
                                         const TensorArgument& block_table,
                                         const TensorArgument& context_lens);

WriteKvParams check_write_kv(const TensorArgument& key, const TensorArgument& value,
                             const TensorArgument& kv_cache, const TensorArgument& slot_mapping,
                             const TensorArgument& k_scale, const TensorArgument& v_scale);

CopyBlocksParams check_copy_blocks(const TensorArgument& kv_cache,
                                   const TensorArgument& block_pairs);

// The result has no merged state yet: see set_new_merged.
MergeStatesParams check_merge_states(const TensorArgument& out_a, const TensorArgument& lse_a,
                                     const TensorArgument& out_b, const TensorArgument& lse_b);
void set_new_merged(MergeStatesParams& params, const OwnedTensor& out, const OwnedTensor& lse);

}  // namespace paged_ops
