// Writing tokens into the cache, copying blocks inside it, and merging attention states.

namespace paged_ops::cpu {
namespace {

constexpr int64_t kBytesPerThread = 1 << 18;  // copied: what pays for waking another thread

// One token's rows of heads, as bits where the type stays the same, else through float.
template <typename From, typename To>
void write_heads(const From* from, int64_t from_stride, To* to, int64_t to_stride, int num_heads,
                 int head_size, const Scale& scale) {
  if (std::is_same_v<From, To> && from_stride == head_size && to_stride == head_size) {
    std::memcpy(to, from, size_t(num_heads) * head_size * sizeof(To));
    return;
  }
  for (int head = 0; head < num_heads; ++head, from += from_stride, to += to_stride) {
    if constexpr (std::is_same_v<From, To>) {
      std::memcpy(to, from, head_size * sizeof(To));
    } else {
      const Vec divisor = broadcast(scale.data == nullptr ? 1.0f : scale.data[head * scale.stride]);
      for (int d = 0; d < head_size; d += kLanes) {
        store(to + d, div(load(from + d, head_size - d), divisor), head_size - d);
      }
    }
  }
}

template <typename From, typename To>
void write_token(const WriteKvParams& params, int64_t token) {
  const int64_t slot = params.slot_mapping[token];
  if (slot < 0) return;
  const int64_t block = slot / params.block_size, offset = slot % params.block_size;
  const auto write = [&](const void* source, int64_t stride_token, int64_t stride_head,
                         const CacheHalf<void*>& half, const Scale& scale) {
    write_heads(static_cast<const From*>(source) + token * stride_token, stride_head,
                static_cast<To*>(half.data) + block * half.stride_block + offset * half.stride_slot,
                half.stride_head, params.num_kv_heads, params.head_size, scale);
  };
  write(params.key, params.key_stride_token, params.key_stride_head, params.key_cache,
        params.k_scale);
  write(params.value, params.value_stride_token, params.value_stride_head, params.value_cache,
        params.v_scale);
}

template <typename From, typename To>
void write_tokens(const WriteKvParams& params) {
  const int64_t token_bytes =
      2 * int64_t{params.num_kv_heads} * params.head_size * int64_t{sizeof(From)};
  const int64_t tokens_per_unit = 1 + kBytesPerThread / (token_bytes + 1);
  const int64_t num_units = (params.num_tokens + tokens_per_unit - 1) / tokens_per_unit;
  for_each_unit(num_units, num_units, [&](int64_t unit) {
    const int64_t begin = unit * tokens_per_unit, end = begin + tokens_per_unit;
    for (int64_t token = begin; token < end && token < params.num_tokens; ++token) {
      write_token<From, To>(params, token);
    }
  });
}

void write_kv(const WriteKvParams& params) {
  with_float_type(params.dtype, [&](auto type) {
    using From = decltype(type);
    if (params.cache_dtype == DType::kFloat8E4M3) return write_tokens<From, Float8E4M3>(params);
    write_tokens<From, From>(params);
  });
}

void copy_block(const CopyBlocksParams& params, int64_t pair) {
  char* const cache = static_cast<char*>(params.kv_cache);
  const int64_t size = params.element_size;
  const char* const source = cache + params.block_pairs[2 * pair] * params.stride_block * size;
  char* const destination = cache + params.block_pairs[2 * pair + 1] * params.stride_block * size;
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t slot = 0; slot < params.block_size; ++slot) {
      for (int64_t head = 0; head < params.num_kv_heads; ++head) {
        const int64_t offset =
            (half * params.stride_kv + slot * params.stride_slot + head * params.stride_head) *
            size;
        std::memcpy(destination + offset, source + offset, params.head_size * size);
      }
    }
  }
}

void copy_blocks(const CopyBlocksParams& params) {
  const int64_t block_bytes =
      2 * int64_t{params.block_size} * params.num_kv_heads * params.head_size * params.element_size;
  const int64_t max_threads = 1 + params.num_pairs * block_bytes / kBytesPerThread;
  for_each_unit(params.num_pairs, max_threads, [&](int64_t pair) { copy_block(params, pair); });
}

// What a side's rows are multiplied by. A side with lse -inf is left out: its out may hold
// anything.
float merge_weight(float lse, float merged_lse) {
  return lse == -kInfinity ? 0.0f : std::exp(lse - merged_lse);
}

float log_add_exp(float a, float b) {
  const float larger = a > b ? a : b, smaller = a > b ? b : a;
  // Beside -inf, -inf - -inf would be NaN, and a NaN is to stay one.
  return larger == -kInfinity ? a + b : larger + std::log1p(std::exp(smaller - larger));
}

template <typename T>
void merge_row(const MergeStatesParams& params, int64_t token, int64_t head) {
  const auto lse_of = [&](const auto& state) {
    return state.lse + token * state.lse_stride_token + head * state.lse_stride_head;
  };
  const auto offset_of = [&](const auto& state) {
    return token * state.out_stride_token + head * state.out_stride_head;
  };
  const float lse_a = *lse_of(params.a), lse_b = *lse_of(params.b);
  const float lse = log_add_exp(lse_a, lse_b);
  const float weight_a = merge_weight(lse_a, lse), weight_b = merge_weight(lse_b, lse);
  const T* const a = static_cast<const T*>(params.a.out) + offset_of(params.a);
  const T* const b = static_cast<const T*>(params.b.out) + offset_of(params.b);
  T* const merged = static_cast<T*>(params.merged.out) + offset_of(params.merged);
  for (int d = 0; d < params.head_size; d += kLanes) {
    const int count = params.head_size - d;
    Vec sum = zero();
    if (lse_a != -kInfinity) sum = mul(broadcast(weight_a), load(a + d, count));
    if (lse_b != -kInfinity) sum = multiply_add(broadcast(weight_b), load(b + d, count), sum);
    store(merged + d, sum, count);
  }
  *lse_of(params.merged) = lse;
}

void merge_states(const MergeStatesParams& params) {
  const int64_t token_elements = int64_t{params.num_heads} * params.head_size;
  const int64_t max_threads = 1 + params.num_tokens * token_elements * 4 / kBytesPerThread;
  with_float_type(params.dtype, [&](auto type) {
    for_each_unit(params.num_tokens, max_threads, [&](int64_t token) {
      for (int64_t head = 0; head < params.num_heads; ++head) {
        merge_row<decltype(type)>(params, token, head);
      }
    });
  });
}

}  // namespace
}  // namespace paged_ops::cpu
