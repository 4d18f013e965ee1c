// A tensor argument as checks and params see it. Every question to a tensor is a call through the C
// interface of torch, its dtype a dozen of them: here each is asked once in a call.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace paged_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Device {
  int32_t type;
  int32_t index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// Valid as long as the tensor. Of an undefined one nothing but `defined` is.
struct TensorView {
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  TensorView(const Tensor& tensor);  // implicit: what takes a view can be given a tensor

  const Tensor& tensor;
  bool defined;
  Device device{};
  int32_t dtype_code = 0;  // of the C interface
  ScalarType dtype = ScalarType::Undefined;
  Sizes sizes;
  Sizes strides;  // in elements
  const char* data = nullptr;

  int64_t numel() const;
  int64_t element_size() const;
  bool contiguous() const;
};

}  // namespace paged_ops
