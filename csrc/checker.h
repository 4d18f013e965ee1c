// The vocabulary of the checks: what a tensor argument can be asked, and the one form of every
// message, "paged::<operator>: <argument> must <what was expected>, got <what came>".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "params.h"

namespace paged_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr char kConstant[] = "";  // bound_by of a size that is known beforehand

// A size with a name: bound where it is first seen, compared wherever it is seen again.
struct Size {
  const char* name;
  int64_t value = -1;
  const char* bound_by = nullptr;  // the argument it was first seen in
};

struct Device {
  int32_t type;
  int32_t index;
};

// Each question to a tensor is a call through the C interface of torch, so sizes and strides are
// asked for once, not one by one.
class Checker {
 public:
  // Every tensor that is checked has to be on the device of `anchor`.
  Checker(const char* op, const char* anchor_name, const Tensor& anchor);

  void device(const char* name, const Tensor& tensor) const;
  void dtype(const char* name, const Tensor& tensor,
             std::initializer_list<ScalarType> accepted) const;
  // Binds the sizes not yet seen and compares the others.
  void shape(const char* name, const Tensor& tensor, std::initializer_list<Size*> sizes) const;
  // The elements along the last dimension are neighbours in memory.
  void unit_stride(const char* name, const Tensor& tensor) const;
  void contiguous(const char* name, const Tensor& tensor) const;
  // No two elements share memory: what is written must not be an expanded tensor.
  void distinct_elements(const char* name, const Tensor& tensor) const;
  // Shares no memory with `other`, judged by the span of addresses from first to last element.
  void disjoint(const char* name, const Tensor& tensor, const char* other_name,
                const Tensor& other) const;
  [[noreturn]] void fail(const char* name, const std::string& expected,
                         const std::string& got) const;

 private:
  const char* op_;
  const char* anchor_name_;
  const Tensor& anchor_;
  const Device anchor_device_;
};

DType to_dtype(ScalarType type);
int32_t to_int32(int64_t value);

}  // namespace paged_ops
