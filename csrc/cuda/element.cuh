// The element types: what each DType is on the device, and its way to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "../params.h"
#include "ptx.cuh"

namespace paged_ops::cuda {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ElementOf<DType::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat8E4M3> {
  using type = __nv_fp8_e4m3;
};

template <DType kDType>
using Element = typename ElementOf<kDType>::type;

inline int bytes_of(DType dtype) {
  if (dtype == DType::kFloat32) return 4;
  return dtype == DType::kFloat8E4M3 ? 1 : 2;
}

// Intrinsics, not casts: torch's build turns the implicit conversions off.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__nv_fp8_e4m3 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3)));
}

// All round to nearest even; float8 saturates to +-448 and keeps NaN.
__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __nv_fp8_e4m3& to) {
  to.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// Calls run(Float()) for the float type that `dtype` names: for what is touched once per row, where
// one more template parameter would triple the kernels and save nothing.
template <typename Run>
__device__ void with_float_type(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat16:
      return run(__half());
    case DType::kBFloat16:
      return run(__nv_bfloat16());
    default:
      return run(float());
  }
}

// The same for the types that the matrix units take.
template <typename Run>
__device__ void with_matrix_type(DType dtype, Run&& run) {
  if (dtype == DType::kFloat16) return run(__half());
  return run(__nv_bfloat16());
}

// The scale of one KV head.
__device__ inline float scale_of(const Scale& scale, int kv_head) {
  return scale.data == nullptr ? 1.0f : load_fresh(scale.data + kv_head * scale.stride);
}

}  // namespace paged_ops::cuda
