#include "checker.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace paged_ops {
namespace {

template <typename Sequence>
std::string bracketed(const Sequence& values) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const auto& value : values) {
    text << separator << value;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

std::string device_name(const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  const bool cuda = device.type == aoti_torch_device_type_cuda();
  return (cuda ? "cuda:" : "device:") + std::to_string(device.index);
}

std::string expected_shape(std::initializer_list<Size*> sizes) {
  std::ostringstream names, values;
  const char* separator = "";
  const char* values_separator = " with ";
  for (const Size* size : sizes) {
    names << separator << size->name;
    separator = ", ";
    if (size->bound_by == nullptr || size->bound_by == kConstant) continue;
    values << values_separator << size->name << "=" << size->value << " (from " << size->bound_by
           << ")";
    values_separator = ", ";
  }
  return "be [" + names.str() + "]" + values.str();
}

// First and one past the last byte that the elements of a tensor lie in.
std::pair<const char*, const char*> span(const TensorArgument& tensor) {
  if (tensor.numel() == 0) return {tensor.data, tensor.data};
  int64_t last = 0;
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    last += (tensor.sizes[d] - 1) * tensor.strides[d];
  }
  return {tensor.data, tensor.data + (last + 1) * tensor.element_size()};
}

}  // namespace

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

void Checker::fail(const char* name, const std::string& expected, const std::string& got) const {
  throw std::runtime_error(std::string("paged::") + op_ + ": " + name + " must " + expected +
                           ", got " + got);
}

void Checker::memory(const char* name, const TensorArgument& tensor) const {
  if (!tensor.defined) fail(name, "be a tensor", "None");
  if (!(tensor.device == anchor_.device)) {
    fail(name, "be on " + device_name(anchor_.device) + " like " + anchor_name_,
         device_name(tensor.device));
  }
  const auto size = static_cast<uintptr_t>(tensor.element_size());
  const uintptr_t excess = reinterpret_cast<uintptr_t>(tensor.data) % size;
  if (excess != 0) {
    fail(name, "lie at a multiple of " + std::to_string(size) + " bytes, the size of an element",
         "an address " + std::to_string(excess) + " past one");
  }
}

void Checker::dtype(const char* name, const TensorArgument& tensor,
                    std::initializer_list<ScalarType> accepted) const {
  if (std::find(accepted.begin(), accepted.end(), tensor.dtype) != accepted.end()) return;
  std::string expected;
  for (const ScalarType each : accepted) {
    expected += (expected.empty() ? "be " : " or ") + std::string(dtype_name(each));
  }
  fail(name, expected, dtype_name(tensor.dtype));
}

void Checker::shape(const char* name, const TensorArgument& tensor,
                    std::initializer_list<Size*> sizes) const {
  const auto got = tensor.sizes;
  bool matches = got.size() == sizes.size();
  size_t dim = 0;
  for (Size* size : sizes) {
    matches = matches && (size->bound_by == nullptr || size->value == got[dim]);
    ++dim;
  }
  if (!matches) fail(name, expected_shape(sizes), bracketed(got));
  dim = 0;
  for (Size* size : sizes) {
    if (size->bound_by == nullptr) *size = {size->name, got[dim], name};
    ++dim;
  }
}

void Checker::unit_stride(const char* name, const TensorArgument& tensor) const {
  const size_t last = tensor.sizes.size() - 1;
  if (tensor.strides[last] == 1 || tensor.sizes[last] <= 1) return;
  fail(name, "have stride 1 in its last dimension", "strides " + bracketed(tensor.strides));
}

void Checker::contiguous(const char* name, const TensorArgument& tensor) const {
  if (!tensor.contiguous()) fail(name, "be contiguous", "strides " + bracketed(tensor.strides));
}

void Checker::distinct_elements(const char* name, const TensorArgument& tensor) const {
  if (tensor.contiguous()) return;
  const auto sizes = tensor.sizes, strides = tensor.strides;
  std::array<std::pair<int64_t, int64_t>, 5> dims{};  // (stride, size); no argument has more
  for (size_t d = 0; d < sizes.size(); ++d) dims[d] = {strides[d], sizes[d]};
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the furthest offset the smaller strides arrive at
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride <= reach) {
      fail(name, "not overlap itself, since it is written", "strides " + bracketed(strides));
    }
    reach += stride * (size - 1);
  }
}

void Checker::disjoint(const char* name, const TensorArgument& tensor, const char* other_name,
                       const TensorArgument& other) const {
  const auto [begin, end] = span(tensor);
  const auto [other_begin, other_end] = span(other);
  if (begin == end || other_begin == other_end) return;
  if (end <= other_begin || other_end <= begin) return;
  fail(name, std::string("not share memory with ") + other_name, "overlapping storage");
}

DType to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    default:
      throw std::logic_error("paged_ops: an unchecked dtype reached to_dtype; please report this");
  }
}

int32_t to_int32(int64_t value) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("paged_ops: a size of " + std::to_string(value) +
                             " does not fit 32 bits");
  }
  return static_cast<int32_t>(value);
}

}  // namespace paged_ops
