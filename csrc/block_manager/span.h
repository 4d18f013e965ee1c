// A pointer and a count: arrays that belong to someone else.
#pragma once

#include <cstdint>

namespace paged_ops {

template <typename T>
struct Span {
  T* data;
  int64_t size;

  T& operator[](int64_t i) const { return data[i]; }
  T* begin() const { return data; }
  T* end() const { return data + size; }
};

}  // namespace paged_ops
