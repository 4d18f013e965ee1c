// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include "before_kernels.h"

// From here on, and for nothing that is included above, the compiler may use these instructions.
// All that follows lies in anonymous namespaces: no other file can come to share its code.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "vec_avx2.h"

#include "attention.inl"
#include "cache.inl"

namespace paged_ops::cpu {
namespace {

template <typename>
struct MathOf {
  using type = Float32Math;
};

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels{"avx2", attention<MathOf>, write_kv, copy_blocks, merge_states};

}  // namespace paged_ops::cpu

#pragma GCC pop_options

#endif
