// Writing tokens into the cache, and copying blocks inside it.
//
// Both move the rows (heads) of one token at a time. Where the dtype stays the same a row is only
// bits, and moves in the widest words that every address and stride allows; into a float8 cache it
// moves as numbers.
#include <algorithm>
#include <cstdint>

#include "../dispatch.h"
#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "words.h"

namespace paged_ops::cuda {
namespace {

constexpr int kThreads = 128;

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

using BuiltWordBytes = Built<1, 2, 4, 8, 16>;

template <typename Word>
__device__ void convert(Word from, float, Word& to) {
  to = from;
}

template <typename Float>
__device__ void convert(Float from, float scale, __nv_fp8_e4m3& to) {
  from_float(to_float(from) / scale, to);
}

// The heads of one token, moved by the whole CTA.
template <typename From, typename To>
__device__ void move_heads(const From* from, int64_t from_stride, To* to, int64_t to_stride,
                           int num_heads, int head_size, const Scale& scale) {
  for (int i = threadIdx.x; i < num_heads * head_size; i += kThreads) {
    const int head = i / head_size;
    const int d = i % head_size;
    convert(from[head * from_stride + d], scale_of(scale, head), to[head * to_stride + d]);
  }
}

// One CTA for each token.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    write_kv_kernel(const __grid_constant__ WriteKvParams params) {
  const int64_t token = blockIdx.x;
  const int64_t slot = params.slot_mapping[token];
  if (slot < 0) return;
  const int64_t block = slot / params.block_size;
  const int64_t offset = slot % params.block_size;

  const auto write = [&](const void* source, int64_t stride_token, int64_t stride_head,
                         const CacheHalf<void*>& half, const Scale& scale) {
    const From* const from = static_cast<const From*>(source) + token * stride_token;
    To* const to =
        static_cast<To*>(half.data) + block * half.stride_block + offset * half.stride_slot;
    move_heads(from, stride_head, to, half.stride_head, params.num_kv_heads, params.head_size,
               scale);
  };
  write(params.key, params.key_stride_token, params.key_stride_head, params.key_cache,
        params.k_scale);
  write(params.value, params.value_stride_token, params.value_stride_head, params.value_cache,
        params.v_scale);
}

// One CTA for each pair along x; along y the CTAs share the slots of both halves.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const __grid_constant__ CopyBlocksParams params) {
  const int64_t source = params.block_pairs[2 * blockIdx.x];
  const int64_t destination = params.block_pairs[2 * blockIdx.x + 1];
  Word* const cache = static_cast<Word*>(params.kv_cache);
  for (int64_t i = blockIdx.y; i < 2 * static_cast<int64_t>(params.block_size); i += gridDim.y) {
    const int64_t half = i / params.block_size;
    const int64_t slot = i % params.block_size;
    Word* const token = cache + half * params.stride_kv + slot * params.stride_slot;
    move_heads(token + source * params.stride_block, params.stride_head,
               token + destination * params.stride_block, params.stride_head, params.num_kv_heads,
               params.head_size, Scale{});
  }
}

// The same parameters, in words instead of elements.
WriteKvParams in_words(WriteKvParams params, int element_bytes, int word) {
  for (int64_t* const length :
       {&params.key_stride_token, &params.key_stride_head, &params.value_stride_token,
        &params.value_stride_head, &params.key_cache.stride_block, &params.key_cache.stride_slot,
        &params.key_cache.stride_head, &params.value_cache.stride_block,
        &params.value_cache.stride_slot, &params.value_cache.stride_head}) {
    *length = *length * element_bytes / word;
  }
  params.head_size = params.head_size * element_bytes / word;
  return params;
}

CopyBlocksParams in_words(CopyBlocksParams params, int word) {
  for (int64_t* const length :
       {&params.stride_block, &params.stride_kv, &params.stride_slot, &params.stride_head}) {
    *length = *length * params.element_size / word;
  }
  params.head_size = params.head_size * params.element_size / word;
  return params;
}

template <typename From, typename To>
void launch_write_kv(const WriteKvParams& params, cudaStream_t stream) {
  launch("write_kv", write_kv_kernel<From, To>, {params.num_tokens}, kThreads, stream, params);
}

}  // namespace

void run_write_kv(const WriteKvParams& params, cudaStream_t stream) {
  if (params.dtype != params.cache_dtype) {
    dispatch(BuiltFloatTypes{}, params.dtype, "key dtype", [&](auto dtype) {
      launch_write_kv<Element<dtype()>, Element<DType::kFloat8E4M3>>(params, stream);
    });
    return;
  }
  const int element_bytes = bytes_of(params.dtype);
  const CacheHalf<void*>&key = params.key_cache, &value = params.value_cache;
  const int word = widest_word(
      element_bytes, {params.key, params.value, key.data, value.data},
      {params.head_size, params.key_stride_token, params.key_stride_head, params.value_stride_token,
       params.value_stride_head, key.stride_block, key.stride_slot, key.stride_head,
       value.stride_block, value.stride_slot, value.stride_head});
  dispatch(BuiltWordBytes{}, word, "word", [&](auto bytes) {
    using Word = typename WordOf<bytes()>::type;
    launch_write_kv<Word, Word>(in_words(params, element_bytes, word), stream);
  });
}

void run_copy_blocks(const CopyBlocksParams& params, cudaStream_t stream) {
  const int word = widest_word(params.element_size, {params.kv_cache},
                               {params.head_size, params.stride_block, params.stride_kv,
                                params.stride_slot, params.stride_head});
  const int64_t ctas = std::min(2 * static_cast<int64_t>(params.block_size), kMaxGridY);
  dispatch(BuiltWordBytes{}, word, "word", [&](auto bytes) {
    launch("copy_blocks", copy_blocks_kernel<typename WordOf<bytes()>::type>,
           {params.num_pairs, ctas}, kThreads, stream, in_words(params, word));
  });
}

}  // namespace paged_ops::cuda
