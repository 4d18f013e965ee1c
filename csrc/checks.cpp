#include "checks.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

namespace paged_ops {
namespace {

constexpr std::initializer_list<ScalarType> kFloatTypes = {ScalarType::Float, ScalarType::Half,
                                                           ScalarType::BFloat16};

// The sizes that tie the arguments of one call together.
struct Sizes {
  Size num_tokens{"num_tokens"};
  Size num_seqs{"num_seqs"};
  Size num_heads{"num_heads"};
  Size num_kv_heads{"num_kv_heads"};
  Size head_size{"head_size"};
  Size num_blocks{"num_blocks"};
  Size block_size{"block_size"};
  Size max_blocks{"max_blocks"};
  Size two{"2", 2, kConstant};
};

void check_tokens(const Checker& check, const char* name, const TensorArgument& tensor,
                  Size& num_heads, Sizes& sizes) {
  check.memory(name, tensor);
  check.dtype(name, tensor, kFloatTypes);
  check.shape(name, tensor, {&sizes.num_tokens, &num_heads, &sizes.head_size});
  check.unit_stride(name, tensor);
}

void check_cache_dtype(const Checker& check, const char* name, const TensorArgument& cache,
                       const char* like_name, const TensorArgument& like) {
  if (cache.dtype == ScalarType::Float8_e4m3fn || cache.dtype == like.dtype) return;
  check.fail(name,
             std::string("have the dtype of ") + like_name + " (" + dtype_name(like.dtype) +
                 ") or be float8_e4m3fn",
             dtype_name(cache.dtype));
}

void check_sizes(const Checker& check, const char* cache_name, const Sizes& sizes) {
  const int64_t heads = sizes.num_kv_heads.value, slots = sizes.block_size.value;
  if (heads <= 0) {
    check.fail(cache_name, "have at least one KV head", std::to_string(heads));
  }
  if (slots <= 0) {
    check.fail(cache_name, "have a block_size of at least 1", std::to_string(slots));
  }
  const int64_t head_size = sizes.head_size.value;
  if (head_size < 1 || head_size > kMaxHeadSize) {
    check.fail(cache_name, "have a head_size from 1 to " + std::to_string(kMaxHeadSize),
               std::to_string(head_size));
  }
}

void check_kv_cache(const Checker& check, const TensorArgument& kv_cache, Sizes& sizes) {
  check.memory("kv_cache", kv_cache);
  check.shape(
      "kv_cache", kv_cache,
      {&sizes.num_blocks, &sizes.two, &sizes.block_size, &sizes.num_kv_heads, &sizes.head_size});
  check.unit_stride("kv_cache", kv_cache);
  check_sizes(check, "kv_cache", sizes);
}

template <typename T>
const T* data_of(const TensorArgument& tensor) {
  return reinterpret_cast<const T*>(tensor.data);
}

// K is half 0 and V is half 1 of a kv_cache.
template <typename Pointer, typename Byte>
CacheHalf<Pointer> half_of(const TensorArgument& kv_cache, Byte* data, int64_t half) {
  const auto strides = kv_cache.strides;
  const int64_t offset = half * strides[1] * kv_cache.element_size();
  return {data + offset, strides[0], strides[2], strides[3]};
}

void check_index(const Checker& check, const char* name, const TensorArgument& tensor,
                 ScalarType type, std::initializer_list<Size*> sizes) {
  check.memory(name, tensor);
  check.dtype(name, tensor, {type});
  check.shape(name, tensor, sizes);
  check.contiguous(name, tensor);
}

const float* check_per_head(const Checker& check, const char* name, const TensorArgument& tensor,
                            Size& num_heads) {
  if (!tensor.given()) return nullptr;
  check_index(check, name, tensor, ScalarType::Float, {&num_heads});
  return data_of<float>(tensor);
}

Scale check_scale(const Checker& check, const char* name, const TensorArgument& scale,
                  const TensorArgument& cache, const Size& num_kv_heads) {
  if (!scale.given()) return {nullptr, 0};
  check.memory(name, scale);
  check.dtype(name, scale, {ScalarType::Float});
  if (cache.dtype != ScalarType::Float8_e4m3fn) {
    check.fail(name, "be given for a float8_e4m3fn cache only",
               std::string("a cache of ") + dtype_name(cache.dtype));
  }
  const size_t dim = scale.sizes.size();
  const bool one = scale.numel() == 1 && dim <= 1;
  const bool per_head = dim == 1 && scale.sizes[0] == num_kv_heads.value;
  if (!one && !per_head) {
    check.fail(
        name, "have 1 element or num_kv_heads=" + std::to_string(num_kv_heads.value),
        std::to_string(scale.numel()) + " elements in " + std::to_string(dim) + " dimensions");
  }
  check.contiguous(name, scale);
  return {data_of<float>(scale), one ? 0 : 1};
}

std::string text_of(double number) {
  std::ostringstream text;
  text << number;
  return text.str();
}

// The kernels compute in float32, with log2(e) times these numbers and with scale / softcap. Well
// inside its range none of these overflows, and no softcap turns into 0, which is none.
void check_numbers(const Checker& check, const AttentionArguments& args) {
  constexpr double kLeast = 1e-30, kLargest = 1e30;
  if (args.scale.has_value() && !(std::abs(*args.scale) <= kLargest)) {
    check.fail("scale", "be finite, from -1e30 to 1e30", text_of(*args.scale));
  }
  if (args.window != -1 && args.window < 1) {
    check.fail("window", "be -1 (no limit) or at least 1", std::to_string(args.window));
  }
  const bool in_range = args.softcap >= kLeast && args.softcap <= kLargest;
  if (args.softcap != 0 && !in_range) {
    check.fail("softcap", "be 0 (none) or positive and finite, from 1e-30 to 1e30",
               text_of(args.softcap));
  }
  const double least = std::abs(args.scale.value_or(1)) / kLargest;
  if (in_range && args.softcap < least) {
    check.fail("softcap", "be at least scale / 1e30 = " + text_of(least), text_of(args.softcap));
  }
}

void check_batch(const Checker& check, const TensorArgument& block_table, const char* lens_name,
                 const TensorArgument& lens, const TensorArgument& query_start_loc, Sizes& sizes) {
  if (!query_start_loc.given()) sizes.num_seqs = {"num_seqs", sizes.num_tokens.value, "query"};
  check.memory("block_table", block_table);
  check.dtype("block_table", block_table, {ScalarType::Int});
  check.shape("block_table", block_table, {&sizes.num_seqs, &sizes.max_blocks});
  check.unit_stride("block_table", block_table);
  check_index(check, lens_name, lens, ScalarType::Int, {&sizes.num_seqs});
  if (query_start_loc.given()) {
    Size bounds{"num_seqs + 1", sizes.num_seqs.value + 1, "block_table"};
    check_index(check, "query_start_loc", query_start_loc, ScalarType::Int, {&bounds});
  }
}

// Read once: a captured graph and the calls beside it should not differ.
bool batch_invariant_by_default() {
  static const bool on = [] {
    const char* const wish = std::getenv("PAGED_OPS_BATCH_INVARIANT");
    return wish != nullptr && std::strcmp(wish, "1") == 0;
  }();
  return on;
}

AttentionParams make_params(const char* op, const char* lens_name, const TensorArgument& query,
                            const TensorArgument& block_table, const TensorArgument& lens,
                            const TensorArgument& query_start_loc, const Sizes& sizes) {
  AttentionParams params{};
  params.op = op;
  params.seq_lens_name = lens_name;
  params.query = query.data;
  params.query_stride_token = query.strides[0];
  params.query_stride_head = query.strides[1];
  params.block_table = data_of<int32_t>(block_table);
  params.block_table_stride = block_table.strides[0];
  params.seq_lens = data_of<int32_t>(lens);
  params.query_start_loc = data_of<int32_t>(query_start_loc);
  params.num_tokens = sizes.num_tokens.value;
  params.num_seqs = sizes.num_seqs.value;
  params.num_blocks = sizes.num_blocks.value;
  params.max_blocks = sizes.max_blocks.value;
  params.num_heads = to_int32(sizes.num_heads.value);
  params.num_kv_heads = to_int32(sizes.num_kv_heads.value);
  params.head_size = to_int32(sizes.head_size.value);
  params.block_size = to_int32(sizes.block_size.value);
  params.scale = 1.0f / std::sqrt(static_cast<float>(params.head_size));
  params.window = -1;
  params.causal = true;
  params.batch_invariant = batch_invariant_by_default();
  params.query_dtype = to_dtype(query.dtype);
  return params;
}

void check_group(const Checker& check, const Sizes& sizes) {
  const int64_t heads = sizes.num_heads.value, kv_heads = sizes.num_kv_heads.value;
  if (heads <= 0 || heads % kv_heads != 0) {
    check.fail("query",
               "have a positive multiple of num_kv_heads=" + std::to_string(kv_heads) + " heads",
               std::to_string(heads));
  }
}

}  // namespace

AttentionParams check_attention(const char* op, const AttentionArguments& args) {
  const Checker check(op, "query", args.query);
  Sizes sizes;
  check_tokens(check, "query", args.query, sizes.num_heads, sizes);
  check_kv_cache(check, args.kv_cache, sizes);
  check_cache_dtype(check, "kv_cache", args.kv_cache, "query", args.query);
  check_group(check, sizes);
  check_batch(check, args.block_table, "seq_lens", args.seq_lens, args.query_start_loc, sizes);
  check_numbers(check, args);

  AttentionParams params = make_params(op, "seq_lens", args.query, args.block_table, args.seq_lens,
                                       args.query_start_loc, sizes);
  params.key_cache = half_of<const void*>(args.kv_cache, args.kv_cache.data, 0);
  params.value_cache = half_of<const void*>(args.kv_cache, args.kv_cache.data, 1);
  params.cache_dtype = to_dtype(args.kv_cache.dtype);
  if (args.scale.has_value()) params.scale = static_cast<float>(*args.scale);
  params.causal = args.causal;
  params.window = args.window;
  params.softcap = static_cast<float>(args.softcap);
  params.batch_invariant = params.batch_invariant || args.batch_invariant;
  params.alibi_slopes = check_per_head(check, "alibi_slopes", args.alibi_slopes, sizes.num_heads);
  params.sinks = check_per_head(check, "sinks", args.sinks, sizes.num_heads);
  params.k_scale = check_scale(check, "k_scale", args.k_scale, args.kv_cache, sizes.num_kv_heads);
  params.v_scale = check_scale(check, "v_scale", args.v_scale, args.kv_cache, sizes.num_kv_heads);
  return params;
}

void check_out(const char* op, const TensorArgument& out, const TensorArgument& query,
               std::initializer_list<std::pair<const char*, const TensorArgument*>> read) {
  const Checker check(op, "query", query);
  Size num_tokens{"num_tokens", query.sizes[0], "query"};
  Size num_heads{"num_heads", query.sizes[1], "query"};
  Size head_size{"head_size", query.sizes[2], "query"};
  check.memory("out", out);
  check.dtype("out", out, kFloatTypes);
  check.shape("out", out, {&num_tokens, &num_heads, &head_size});
  check.unit_stride("out", out);
  check.distinct_elements("out", out);
  for (const auto& [name, tensor] : read) check.disjoint("out", out, name, *tensor);
}

void set_out(AttentionParams& params, const TensorArgument& out) {
  params.out = mutable_data(out.handle);
  params.out_stride_token = out.strides[0];
  params.out_stride_head = out.strides[1];
  params.out_dtype = to_dtype(out.dtype);
}

void set_new_out(AttentionParams& params, const OwnedTensor& out) {
  params.out = mutable_data(out);
  params.out_stride_token = int64_t{params.num_heads} * params.head_size;
  params.out_stride_head = params.head_size;
  params.out_dtype = params.query_dtype;
}

void set_new_lse(AttentionParams& params, const OwnedTensor& lse) {
  params.lse = static_cast<float*>(mutable_data(lse));
}

AttentionParams check_paged_attention_v1(const TensorArgument& query,
                                         const TensorArgument& key_cache,
                                         const TensorArgument& value_cache,
                                         const TensorArgument& block_table,
                                         const TensorArgument& context_lens) {
  constexpr const char* kOp = "paged_attention_v1";
  constexpr const char* kLens = "context_lens";
  const Checker check(kOp, "query", query);
  Sizes sizes;
  check_tokens(check, "query", query, sizes.num_heads, sizes);
  for (const auto& [name, cache] :
       {std::pair{"key_cache", &key_cache}, std::pair{"value_cache", &value_cache}}) {
    check.memory(name, *cache);
    check.shape(name, *cache,
                {&sizes.num_blocks, &sizes.block_size, &sizes.num_kv_heads, &sizes.head_size});
    check.unit_stride(name, *cache);
    check_sizes(check, name, sizes);
    check_cache_dtype(check, name, *cache, "query", query);
  }
  check.dtype("value_cache", value_cache, {key_cache.dtype});
  check_group(check, sizes);
  const TensorArgument query_start_loc(nullptr);
  check_batch(check, block_table, kLens, context_lens, query_start_loc, sizes);

  AttentionParams params =
      make_params(kOp, kLens, query, block_table, context_lens, query_start_loc, sizes);
  const auto whole = [](const TensorArgument& cache) {
    return CacheHalf<const void*>{cache.data, cache.strides[0], cache.strides[1], cache.strides[2]};
  };
  params.key_cache = whole(key_cache);
  params.value_cache = whole(value_cache);
  params.cache_dtype = to_dtype(key_cache.dtype);
  return params;
}

WriteKvParams check_write_kv(const TensorArgument& key, const TensorArgument& value,
                             const TensorArgument& kv_cache, const TensorArgument& slot_mapping,
                             const TensorArgument& k_scale, const TensorArgument& v_scale) {
  const Checker check("write_kv", "key", key);
  Sizes sizes;
  check_tokens(check, "key", key, sizes.num_kv_heads, sizes);
  check_tokens(check, "value", value, sizes.num_kv_heads, sizes);
  check.dtype("value", value, {key.dtype});
  check_kv_cache(check, kv_cache, sizes);
  check_cache_dtype(check, "kv_cache", kv_cache, "key", key);
  check.distinct_elements("kv_cache", kv_cache);
  check.disjoint("kv_cache", kv_cache, "key", key);
  check.disjoint("kv_cache", kv_cache, "value", value);
  check_index(check, "slot_mapping", slot_mapping, ScalarType::Long, {&sizes.num_tokens});

  WriteKvParams params{};
  params.key = key.data;
  params.key_stride_token = key.strides[0];
  params.key_stride_head = key.strides[1];
  params.value = value.data;
  params.value_stride_token = value.strides[0];
  params.value_stride_head = value.strides[1];
  char* const cache_data = static_cast<char*>(mutable_data(kv_cache.handle));
  params.key_cache = half_of<void*>(kv_cache, cache_data, 0);
  params.value_cache = half_of<void*>(kv_cache, cache_data, 1);
  params.slot_mapping = data_of<int64_t>(slot_mapping);
  params.k_scale = check_scale(check, "k_scale", k_scale, kv_cache, sizes.num_kv_heads);
  params.v_scale = check_scale(check, "v_scale", v_scale, kv_cache, sizes.num_kv_heads);
  params.num_tokens = sizes.num_tokens.value;
  params.num_blocks = sizes.num_blocks.value;
  params.num_kv_heads = to_int32(sizes.num_kv_heads.value);
  params.head_size = to_int32(sizes.head_size.value);
  params.block_size = to_int32(sizes.block_size.value);
  params.dtype = to_dtype(key.dtype);
  params.cache_dtype = to_dtype(kv_cache.dtype);
  return params;
}

CopyBlocksParams check_copy_blocks(const TensorArgument& kv_cache,
                                   const TensorArgument& block_pairs) {
  const Checker check("copy_blocks", "kv_cache", kv_cache);
  Sizes sizes;
  Size num_pairs{"num_pairs"};
  check_kv_cache(check, kv_cache, sizes);
  check.dtype(
      "kv_cache", kv_cache,
      {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Float8_e4m3fn});
  check.distinct_elements("kv_cache", kv_cache);
  check_index(check, "block_pairs", block_pairs, ScalarType::Long, {&num_pairs, &sizes.two});

  CopyBlocksParams params{};
  params.kv_cache = mutable_data(kv_cache.handle);
  params.stride_block = kv_cache.strides[0];
  params.stride_kv = kv_cache.strides[1];
  params.stride_slot = kv_cache.strides[2];
  params.stride_head = kv_cache.strides[3];
  params.block_pairs = data_of<int64_t>(block_pairs);
  params.num_pairs = num_pairs.value;
  params.num_blocks = sizes.num_blocks.value;
  params.block_size = to_int32(sizes.block_size.value);
  params.num_kv_heads = to_int32(sizes.num_kv_heads.value);
  params.head_size = to_int32(sizes.head_size.value);
  params.element_size = to_int32(kv_cache.element_size());
  return params;
}

MergeStatesParams check_merge_states(const TensorArgument& out_a, const TensorArgument& lse_a,
                                     const TensorArgument& out_b, const TensorArgument& lse_b) {
  const Checker check("merge_states", "out_a", out_a);
  Sizes sizes;
  check_tokens(check, "out_a", out_a, sizes.num_heads, sizes);
  check_tokens(check, "out_b", out_b, sizes.num_heads, sizes);
  check.dtype("out_b", out_b, {out_a.dtype});
  for (const auto& [name, lse] : {std::pair{"lse_a", &lse_a}, std::pair{"lse_b", &lse_b}}) {
    check.memory(name, *lse);
    check.dtype(name, *lse, {ScalarType::Float});
    check.shape(name, *lse, {&sizes.num_tokens, &sizes.num_heads});
  }

  const auto state = [](const TensorArgument& out, const TensorArgument& lse) {
    return AttentionState<const void*, const float*>{out.data,       out.strides[0],
                                                     out.strides[1], data_of<float>(lse),
                                                     lse.strides[0], lse.strides[1]};
  };
  MergeStatesParams params{};
  params.a = state(out_a, lse_a);
  params.b = state(out_b, lse_b);
  params.num_tokens = sizes.num_tokens.value;
  params.num_heads = to_int32(sizes.num_heads.value);
  params.head_size = to_int32(sizes.head_size.value);
  params.dtype = to_dtype(out_a.dtype);
  return params;
}

void set_new_merged(MergeStatesParams& params, const OwnedTensor& out, const OwnedTensor& lse) {
  params.merged = {mutable_data(out), int64_t{params.num_heads} * params.head_size,
                   params.head_size,  static_cast<float*>(mutable_data(lse)),
                   params.num_heads,  1};
}

}  // namespace paged_ops
