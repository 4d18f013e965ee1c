// The kernels for AVX-512.
#if defined(__x86_64__)

#include "before_kernels.h"

// From here on, and for nothing that is included above, the compiler may use these instructions.
// All that follows lies in anonymous namespaces: no other file can come to share its code.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#include "vec_avx512.h"

#include "attention.inl"
#include "cache.inl"

namespace paged_ops::cpu {
namespace {

template <typename>
struct MathOf {
  using type = Float32Math;
};

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels{"avx512", attention<MathOf>, write_kv, copy_blocks, merge_states};

}  // namespace paged_ops::cpu

#pragma GCC pop_options

#endif
