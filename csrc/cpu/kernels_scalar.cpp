// The kernels in plain C++, for any machine.
#include "before_kernels.h"
#include "vec_scalar.h"

// The algorithms, over the vectors above.
#include "attention.inl"
#include "cache.inl"

namespace paged_ops::cpu {
namespace {

template <typename>
struct MathOf {
  using type = Float32Math;
};

}  // namespace

extern const Kernels kScalarKernels;
const Kernels kScalarKernels{"scalar", attention<MathOf>, write_kv, copy_blocks, merge_states};

}  // namespace paged_ops::cpu
