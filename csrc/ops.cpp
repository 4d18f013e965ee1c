// The operators: their schemas and nothing else. paged_ops/ops.py documents each one.
//
// No overloads, no tags and no returned aliases: torch.compile, torch.export and AOTInductor then
// need nothing but the schema and the fake. The cache is one tensor on purpose: two mutated
// arguments that share storage make Inductor copy the whole cache or compute wrong results.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(paged, m) {
  m.def(
      "attention(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? query_start_loc=None, *, float? scale=None, bool causal=True, SymInt window=-1, "
      "float softcap=0., Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None, bool batch_invariant=False) -> Tensor");
  m.def(
      "attention_lse(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? query_start_loc=None, *, float? scale=None, bool causal=True, SymInt window=-1, "
      "float softcap=0., Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None, bool batch_invariant=False) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_out(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? query_start_loc=None, *, float? scale=None, bool causal=True, SymInt window=-1, "
      "float softcap=0., Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None, bool batch_invariant=False, Tensor(a!) out) -> ()");
  m.def(
      "write_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, *, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> ()");
  m.def("copy_blocks(Tensor(a!) kv_cache, Tensor block_pairs) -> ()");
  m.def(
      "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "paged_attention_v1(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor block_table, Tensor context_lens) -> ()");
}
