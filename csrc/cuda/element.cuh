// The element types: what each DType is on the device, and its way to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "../params.h"

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

// Element `index` of an array whose dtype is known at run time only: for what is touched once per
// row, where one more template parameter would triple the kernels and save nothing.
__device__ inline float load_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(data)[index]);
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ inline void store_float(float x, void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return from_float(x, static_cast<__half*>(data)[index]);
    case DType::kBFloat16:
      return from_float(x, static_cast<__nv_bfloat16*>(data)[index]);
    default:
      return from_float(x, static_cast<float*>(data)[index]);
  }
}

// The scale of one KV head.
__device__ inline float scale_of(const Scale& scale, int kv_head) {
  return scale.data == nullptr ? 1.0f : scale.data[kv_head * scale.stride];
}

}  // namespace paged_ops::cuda
