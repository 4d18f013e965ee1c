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
#include "ptx.cuh"
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

struct BlockAndOffset {
  int64_t block;
  int64_t offset;
};

// Divisions of 64 bits are slow, and slots mostly small.
__device__ BlockAndOffset split(int64_t slot, int32_t block_size) {
  if (slot >> 32 != 0) return {slot / block_size, slot % block_size};
  const auto small = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(block_size);
  return {small / size, small % size};
}

// One CTA for each token. A thread asks for its part of the key and of the value before it waits
// for the slot: three reads of memory then take as long as one.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    write_kv_kernel(const __grid_constant__ WriteKvParams params) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const int64_t slot = params.slot_mapping[token];
  const auto* const key = static_cast<const From*>(params.key) + token * params.key_stride_token;
  const auto* const value =
      static_cast<const From*>(params.value) + token * params.value_stride_token;
  for (int i = threadIdx.x; i < params.num_kv_heads * params.head_size; i += kThreads) {
    const int head = i / params.head_size;
    const int d = i % params.head_size;
    const From of_key = key[head * params.key_stride_head + d];
    const From of_value = value[head * params.value_stride_head + d];
    if (slot < 0) return;
    const auto at = split(slot, params.block_size);
    const auto place = [&](const CacheHalf<void*>& half) {
      return static_cast<To*>(half.data) + at.block * half.stride_block +
             at.offset * half.stride_slot + head * half.stride_head + d;
    };
    convert(of_key, scale_of(params.k_scale, head), *place(params.key_cache));
    convert(of_value, scale_of(params.v_scale, head), *place(params.value_cache));
  }
}

// One CTA for each pair along x; along y the CTAs share the slots of both halves.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const __grid_constant__ CopyBlocksParams params) {
  wait_for_previous_kernel();
  const int64_t source = params.block_pairs[2 * blockIdx.x];
  const int64_t destination = params.block_pairs[2 * blockIdx.x + 1];
  Word* const cache = static_cast<Word*>(params.kv_cache);
  for (int64_t i = blockIdx.y; i < 2 * static_cast<int64_t>(params.block_size); i += gridDim.y) {
    const int64_t half = i / params.block_size;
    const int64_t slot = i % params.block_size;
    Word* const token = cache + half * params.stride_kv + slot * params.stride_slot;
    for (int j = threadIdx.x; j < params.num_kv_heads * params.head_size; j += kThreads) {
      const int64_t at = j / params.head_size * params.stride_head + j % params.head_size;
      token[destination * params.stride_block + at] = token[source * params.stride_block + at];
    }
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
  launch<write_kv_kernel<From, To>>("write_kv", {params.num_tokens}, kThreads, stream, params);
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
    launch<copy_blocks_kernel<typename WordOf<bytes()>::type>>(
        "copy_blocks", {params.num_pairs, ctas}, kThreads, stream, in_words(params, word));
  });
}

}  // namespace paged_ops::cuda
