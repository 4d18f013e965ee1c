// Merging two attention states of the same queries over disjoint keys. One warp for each row.
#include <cstdint>

#include "../dispatch.h"
#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace paged_ops::cuda {
namespace {

constexpr int kWarps = 4;

// log(e^a + e^b), NaN if either is NaN.
__device__ float log_add_exp(float a, float b) {
  const float larger = a > b ? a : b;
  const float smaller = a > b ? b : a;
  return larger == -INFINITY ? a + b : larger + log1pf(expf(smaller - larger));
}

// A side that has seen no key may hold anything in `out`: it is left out, not multiplied by 0.
__device__ float weighted(float out, float weight, float lse) {
  return lse == -INFINITY ? 0.0f : weight * out;
}

template <typename Float>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    merge_states_kernel(const __grid_constant__ MergeStatesParams params) {
  wait_for_previous_kernel();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = row / params.num_heads;
  const int64_t head = row % params.num_heads;
  if (token >= params.num_tokens) return;

  const auto out_of = [&](const auto& state) {
    return token * state.out_stride_token + head * state.out_stride_head;
  };
  const auto lse_of = [&](const auto& state) {
    return token * state.lse_stride_token + head * state.lse_stride_head;
  };
  const float lse_a = params.a.lse[lse_of(params.a)];
  const float lse_b = params.b.lse[lse_of(params.b)];
  const float lse = log_add_exp(lse_a, lse_b);
  const float weight_a = expf(lse_a - lse);
  const float weight_b = expf(lse_b - lse);

  const Float* const out_a = static_cast<const Float*>(params.a.out) + out_of(params.a);
  const Float* const out_b = static_cast<const Float*>(params.b.out) + out_of(params.b);
  Float* const merged = static_cast<Float*>(params.merged.out) + out_of(params.merged);
  for (int d = lane; d < params.head_size; d += kWarpSize) {
    const float sum = weighted(to_float(out_a[d]), weight_a, lse_a) +
                      weighted(to_float(out_b[d]), weight_b, lse_b);
    from_float(sum, merged[d]);
  }
  if (lane == 0) params.merged.lse[lse_of(params.merged)] = lse;
}

}  // namespace

void run_merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  dispatch(BuiltFloatTypes{}, params.dtype, "out dtype", [&](auto dtype) {
    launch<merge_states_kernel<Element<dtype()>>>(
        "merge_states", {ceil_div(params.num_tokens * params.num_heads, kWarps)},
        kWarps * kWarpSize, stream, params);
  });
}

}  // namespace paged_ops::cuda
