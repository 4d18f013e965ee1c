// The vocabulary of the checks: what a tensor argument has to be, and the one form of every
// message, "paged::<operator>: <argument> must <what was expected>, got <what came>".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "params.h"
#include "tensor.h"

namespace paged_ops {

inline constexpr char kConstant[] = "";  // bound_by of a size that is known beforehand

// A size with a name: bound where it is first seen, compared wherever it is seen again.
struct Size {
  const char* name;
  int64_t value = -1;
  const char* bound_by = nullptr;  // the argument it was first seen in
};

class Checker {
 public:
  Checker(const char* op, const char* anchor_name, const TensorArgument& anchor)
      : op_(op), anchor_name_(anchor_name), anchor_(anchor) {}

  // A tensor on the device of `anchor`, aligned to its elements.
  void memory(const char* name, const TensorArgument& tensor) const;
  void dtype(const char* name, const TensorArgument& tensor,
             std::initializer_list<ScalarType> accepted) const;
  // Binds the sizes not yet seen and compares the others.
  void shape(const char* name, const TensorArgument& tensor,
             std::initializer_list<Size*> sizes) const;
  // The elements along the last dimension are neighbours in memory.
  void unit_stride(const char* name, const TensorArgument& tensor) const;
  void contiguous(const char* name, const TensorArgument& tensor) const;
  // No two elements share memory: what is written must not be an expanded tensor.
  void distinct_elements(const char* name, const TensorArgument& tensor) const;
  // Shares no memory with `other`, judged by the span of addresses from first to last element.
  void disjoint(const char* name, const TensorArgument& tensor, const char* other_name,
                const TensorArgument& other) const;
  [[noreturn]] void fail(const char* name, const std::string& expected,
                         const std::string& got) const;

 private:
  const char* op_;
  const char* anchor_name_;
  const TensorArgument& anchor_;
};

// As Python has it, for messages.
const char* dtype_name(ScalarType type);

DType to_dtype(ScalarType type);
int32_t to_int32(int64_t value);

}  // namespace paged_ops
