#include "../dispatch.h"
#include "attention.cuh"
#include "kernels.h"

namespace paged_ops::cuda {
namespace {

using BuiltCacheTypes =
    Built<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3>;

// Elements of a head that a lane holds: head sizes up to 32, 64, ... 256.
using BuiltElements = Built<1, 2, 3, 4, 6, 8>;

// The smallest built number that holds the head.
template <int... kElements>
int elements_for(Built<kElements...>, int head_size) {
  int chosen = 0;
  ((chosen == 0 && head_size <= kElements* kWarpSize ? chosen = kElements : 0), ...);
  return chosen;
}

}  // namespace

void run_attention(const AttentionParams& params, cudaStream_t stream) {
  const int elements = elements_for(BuiltElements{}, params.head_size);
  dispatch(BuiltCacheTypes{}, params.cache_dtype, "kv_cache dtype", [&](auto cache) {
    dispatch(BuiltElements{}, elements, "elements per lane",
             [&](auto count) { launch_attention<Element<cache()>, count()>(params, stream); });
  });
}

}  // namespace paged_ops::cuda
