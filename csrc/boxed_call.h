// A call as the dispatcher makes it: a stack of 64-bit values, which holds the arguments in the
// order of the schema, and afterwards the results. What is in a value is documented at
// StableLibrary::impl (torch/csrc/stable/library.h) and Handling std::optional
// (stableivalue_conversions.h), and the conversions are torch's own. TORCH_BOX differs in one
// point: it shares each tensor's handle, where here a TensorArgument owns it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "tensor.h"

namespace paged_ops {

class BoxedCall {
 public:
  explicit BoxedCall(StableIValue* stack) : stack_(stack) {}

  // The next argument. Whoever reads one has to read them all before anything is raised: those on
  // the stack belong to nobody.
  template <typename T>
  T next() {
    return torch::stable::detail::to<T>(stack_[num_read_++]);
  }
  TensorArgument next_tensor() { return TensorArgument(next<AtenTensorHandle>()); }
  TensorArgument next_optional_tensor() {
    return TensorArgument(next<std::optional<AtenTensorHandle>>().value_or(nullptr));
  }

  // The next result, when all arguments have been read.
  void put(OwnedTensor result) {
    stack_[num_results_++] = torch::stable::detail::from(result.release());
  }

  void check_counts(uint64_t num_args, uint64_t num_results) const {
    if (num_read_ == num_args && num_results_ == num_results) return;
    throw std::logic_error("paged_ops: an operator does not fit its schema; please report this");
  }

 private:
  StableIValue* stack_;
  uint64_t num_read_ = 0;
  uint64_t num_results_ = 0;
};

// What is registered for an operator. Errors pass through the dispatcher as C++ exceptions.
template <void (*kOperator)(BoxedCall&)>
void boxed(StableIValue* stack, uint64_t num_args, uint64_t num_results) {
  BoxedCall call(stack);
  kOperator(call);
  call.check_counts(num_args, num_results);
}

}  // namespace paged_ops
