// Numbers from Python. Arrays of tokens may be long and are read where they lie; ids and counts are
// copied, since others may write to an array while a method runs without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "span.h"

namespace paged_ops {

// A view of an object's memory for as long as this lives; to be made and destroyed with the GIL.
class BufferView {
 public:
  BufferView() = default;
  BufferView(pybind11::handle object, int flags) { open(object, flags); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;
  ~BufferView() { PyBuffer_Release(&view_); }

  // False, with no Python error set, if the object has no such memory.
  bool open(pybind11::handle object, int flags) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) == 0) return true;
    PyErr_Clear();
    return false;
  }

  const Py_buffer& operator*() const { return view_; }

  // Signed integers of so many bytes each, in the machine's byte order.
  bool holds_integers(int64_t bytes) const {
    if (view_.format == nullptr || view_.itemsize != bytes) return false;
    const std::string format = view_.format;
    return std::string("<=@").find(format[0]) == std::string::npos ? is_integer(format)
                                                                   : is_integer(format.substr(1));
  }

 private:
  static bool is_integer(const std::string& type) {
    return type == "i" || type == "l" || type == "q";
  }

  Py_buffer view_{};
};

// A list, tuple, range or other sequence of int, or an array of int64 or int32 with one dimension.
class IntegerArray {
 public:
  explicit IntegerArray(bool in_place) : in_place_(in_place) {}

  Span<const int64_t> span() const { return span_; }

  // False for anything else.
  bool load(pybind11::handle source) {
    if (PyObject_CheckBuffer(source.ptr())) return load_buffer(source);
    const bool is_sequence = PySequence_Check(source.ptr()) && !PyUnicode_Check(source.ptr());
    return is_sequence && load_sequence(source);
  }

 private:
  bool load_buffer(pybind11::handle source) {
    if (!view_.open(source, PyBUF_ND | PyBUF_FORMAT) || (*view_).ndim != 1) return false;
    const int64_t size = (*view_).shape[0];
    if (view_.holds_integers(sizeof(int64_t))) {
      const auto* wide = static_cast<const int64_t*>((*view_).buf);
      if (in_place_) {
        span_ = {wide, size};
      } else {
        own(std::vector<int64_t>(wide, wide + size));
      }
      return true;
    }
    if (!view_.holds_integers(sizeof(int32_t))) return false;
    const auto* narrow = static_cast<const int32_t*>((*view_).buf);
    own(std::vector<int64_t>(narrow, narrow + size));
    return true;
  }

  // Items other than int are converted by Python code, which may change a list: they are read from
  // a tuple of its own.
  bool load_sequence(pybind11::handle source) {
    const auto items =
        is_list_of_int(source)
            ? pybind11::reinterpret_borrow<pybind11::object>(source)
            : pybind11::reinterpret_steal<pybind11::object>(PySequence_Tuple(source.ptr()));
    if (!items) return fail();
    std::vector<int64_t> numbers(PySequence_Fast_GET_SIZE(items.ptr()));
    PyObject** const objects = PySequence_Fast_ITEMS(items.ptr());
    for (size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = PyLong_AsLongLong(objects[i]);
      if (numbers[i] == -1 && PyErr_Occurred()) return fail();
    }
    own(std::move(numbers));
    return true;
  }

  static bool is_list_of_int(pybind11::handle source) {
    if (!PyList_Check(source.ptr())) return false;
    PyObject** const items = PySequence_Fast_ITEMS(source.ptr());
    return std::all_of(items, items + PyList_GET_SIZE(source.ptr()),
                       [](PyObject* item) { return PyLong_Check(item); });
  }

  bool fail() {
    PyErr_Clear();
    return false;
  }

  void own(std::vector<int64_t> numbers) {
    numbers_ = std::move(numbers);
    span_ = {numbers_.data(), static_cast<int64_t>(numbers_.size())};
  }

  const bool in_place_;
  BufferView view_;
  std::vector<int64_t> numbers_;
  Span<const int64_t> span_{nullptr, 0};
};

// The same as an argument of a Python function; anything else is a TypeError that names it.
template <const char* kName, bool kInPlace = false>
class Integers : public IntegerArray {
 public:
  Integers() : IntegerArray(kInPlace) {}
};

}  // namespace paged_ops

template <const char* kName, bool kInPlace>
struct pybind11::detail::type_caster<paged_ops::Integers<kName, kInPlace>> {
  using Array = paged_ops::Integers<kName, kInPlace>;
  static constexpr auto name = const_name("Sequence[int]");
  template <typename T>
  using cast_op_type = const Array&;

  bool load(handle source, bool) {
    if (array_.load(source)) return true;
    throw type_error(std::string(kName) +
                     " must be a sequence of int or a contiguous array of int64 or int32 with one "
                     "dimension, got " +
                     std::string(str(module_::import("reprlib").attr("repr")(source))));
  }
  operator const Array&() { return array_; }

 private:
  Array array_;
};
