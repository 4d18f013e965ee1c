// Tensors as the library holds them: the handles of torch's C interface, each owned once. A
// torch::stable::Tensor shares its handle instead, which costs an allocation for each argument.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <initializer_list>
#include <memory>

namespace paged_ops {

using torch::headeronly::ScalarType;

struct Device {
  int32_t type;
  int32_t index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

struct DeleteTensor {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};

using OwnedTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// Contiguous, with unset elements. Past the dispatcher, which would cost a microsecond.
OwnedTensor new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype_code, Device device);

void* mutable_data(const OwnedTensor& tensor);

// A tensor argument as checks and params see it. Every question to a tensor is a call through the C
// interface of torch: here each is asked once in a call.
struct TensorArgument {
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  // Takes the handle over; nullptr is an argument that was not given. What torch cannot describe
  // counts as undefined, which the checks refuse: raised here, the arguments that come after it
  // would have no owner.
  explicit TensorArgument(AtenTensorHandle handle) noexcept;

  const OwnedTensor handle;
  bool defined = false;  // if not, nothing below is known
  Device device{};
  int32_t dtype_code = 0;  // of the C interface
  ScalarType dtype = ScalarType::Undefined;
  Sizes sizes;
  Sizes strides;  // in elements
  const char* data = nullptr;

  bool given() const { return handle != nullptr; }
  int64_t numel() const;
  int64_t element_size() const;
  bool contiguous() const;
};

}  // namespace paged_ops
