// In what words memory can be moved.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace paged_ops::cuda {

// Bytes, 16 at most, of the widest word that sits at every address and divides every length and
// stride (in elements).
inline int widest_word(int element_bytes, std::initializer_list<const void*> addresses,
                       std::initializer_list<int64_t> lengths) {
  uint64_t bits = 16;
  for (const void* const address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  for (const int64_t length : lengths) bits |= static_cast<uint64_t>(length * element_bytes);
  return static_cast<int>(bits & -bits);  // the lowest bit set: the largest power of two
}

}  // namespace paged_ops::cuda
