// The kernels for AMX with bfloat16 tiles.
#if defined(__x86_64__)

#include "before_kernels.h"

// From here on, and for nothing that is included above, the compiler may use these instructions.
// All that follows lies in anonymous namespaces: no other file can come to share its code.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,f16c")
#include "vec_amx.h"

#include "attention.inl"
#include "cache.inl"
#include "tile_amx.inl"

namespace paged_ops::cpu {
namespace {

constexpr Blocking kBlocking{256, 256, 1 << 18};

template <typename>
struct MathOf {
  using type = Float32Math;
};
template <>
struct MathOf<BFloat16> {
  using type = AmxMath;
};
template <>
struct MathOf<Float8E4M3> {
  using type = AmxMath;
};

}  // namespace

extern const Kernels kAmxKernels;
const Kernels kAmxKernels{"amx", attention<MathOf, kBlocking>, write_kv, copy_blocks, merge_states};

}  // namespace paged_ops::cpu

#pragma GCC pop_options

#endif
