#include "tensor.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace paged_ops {
namespace {

constexpr size_t kMaxNewDims = 3;

bool answered(AOTITorchError error) { return error == AOTI_TORCH_SUCCESS; }

// Of what the operators take and of what is likely to be handed to them by mistake. The code of a
// dtype is a call each.
ScalarType dtype_of(int32_t code) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_int32(), ScalarType::Int},
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_float8_e4m3fn(), ScalarType::Float8_e4m3fn},
      {aoti_torch_dtype_int64(), ScalarType::Long},
      {aoti_torch_dtype_float64(), ScalarType::Double},
      {aoti_torch_dtype_bool(), ScalarType::Bool},
      {aoti_torch_dtype_uint8(), ScalarType::Byte},
      {aoti_torch_dtype_int8(), ScalarType::Char},
      {aoti_torch_dtype_int16(), ScalarType::Short},
      {aoti_torch_dtype_float8_e5m2(), ScalarType::Float8_e5m2},
  };
  for (const auto& [known_code, dtype] : known) {
    if (code == known_code) return dtype;
  }
  return ScalarType::Undefined;
}

}  // namespace

OwnedTensor new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype_code, Device device) {
  std::array<int64_t, kMaxNewDims> strides{};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes.begin()[d];
  }
  AtenTensorHandle made = nullptr;
  if (!answered(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                         strides.data(), dtype_code, device.type, device.index,
                                         &made))) {
    throw std::runtime_error("paged_ops: no memory for a new tensor");
  }
  return OwnedTensor(made);
}

void* mutable_data(const OwnedTensor& tensor) {
  void* data = nullptr;
  if (!answered(torch_get_mutable_data_ptr(tensor.get(), &data))) {
    throw std::runtime_error("paged_ops: a tensor whose memory cannot be written");
  }
  return data;
}

TensorArgument::TensorArgument(AtenTensorHandle handle) noexcept : handle(handle) {
  if (handle == nullptr || !answered(aoti_torch_is_defined(handle, &defined)) || !defined) return;
  int64_t dim = 0;
  int64_t *first_size = nullptr, *first_stride = nullptr;
  const void* first_element = nullptr;
  defined = answered(aoti_torch_get_device_type(handle, &device.type)) &&
            answered(aoti_torch_get_device_index(handle, &device.index)) &&
            answered(aoti_torch_get_dtype(handle, &dtype_code)) &&
            answered(aoti_torch_get_dim(handle, &dim)) &&
            answered(aoti_torch_get_sizes(handle, &first_size)) &&
            answered(aoti_torch_get_strides(handle, &first_stride)) &&
            answered(torch_get_const_data_ptr(handle, &first_element));
  if (!defined) return;
  dtype = dtype_of(dtype_code);
  sizes = Sizes(first_size, dim);
  strides = Sizes(first_stride, dim);
  data = static_cast<const char*>(first_element);
}

int64_t TensorArgument::numel() const {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

int64_t TensorArgument::element_size() const {
  return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code));
}

bool TensorArgument::contiguous() const {
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
