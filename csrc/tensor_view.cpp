#include "tensor_view.h"

#include <stdexcept>

namespace paged_ops {
namespace {

void ask(AOTITorchError answer) {
  if (answer == AOTI_TORCH_SUCCESS) return;
  throw std::logic_error("paged_ops: a tensor that cannot be described; please report this");
}

}  // namespace

TensorView::TensorView(const Tensor& tensor) : tensor(tensor), defined(tensor.defined()) {
  if (!defined) return;
  const AtenTensorHandle handle = tensor.get();
  ask(aoti_torch_get_device_type(handle, &device.type));
  ask(aoti_torch_get_device_index(handle, &device.index));
  ask(aoti_torch_get_dtype(handle, &dtype_code));
  dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_code));
  int64_t dim = 0;
  int64_t *first_size = nullptr, *first_stride = nullptr;
  ask(aoti_torch_get_dim(handle, &dim));
  ask(aoti_torch_get_sizes(handle, &first_size));
  ask(aoti_torch_get_strides(handle, &first_stride));
  sizes = Sizes(first_size, dim);
  strides = Sizes(first_stride, dim);
  data = static_cast<const char*>(tensor.const_data_ptr());
}

int64_t TensorView::numel() const {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

int64_t TensorView::element_size() const {
  return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code));
}

bool TensorView::contiguous() const {
  int64_t expected = 1;
  bool dense = true;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] == 0) return true;
    if (sizes[d] == 1) continue;
    dense = dense && strides[d] == expected;
    expected *= sizes[d];
  }
  return dense;
}

}  // namespace paged_ops
