// What is built, each value listed once, and the step from a run-time value to a compile-time
// constant.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace paged_ops {

template <auto... kValues>
struct Built {};

using BuiltFloatTypes = Built<DType::kFloat32, DType::kFloat16, DType::kBFloat16>;

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
  }
  return "unknown";
}

inline std::string name_of(int value) { return std::to_string(value); }

// The smallest value of an ascending list that is at least `value`; 0 if there is none.
template <typename T, T... kValues>
T built_for(Built<kValues...>, T value) {
  T chosen = 0;
  ((chosen == 0 && value <= kValues ? chosen = kValues : 0), ...);
  return chosen;
}

// Calls run(std::integral_constant<T, value>()) for the listed value that equals `value`; the error
// for a value that is not listed names it and the list.
template <typename T, T... kValues, typename Run>
void dispatch(Built<kValues...>, T value, const char* name, Run&& run) {
  const bool found =
      ((value == kValues ? (run(std::integral_constant<T, kValues>{}), true) : false) || ...);
  if (found) return;
  std::ostringstream message;
  message << "paged_ops: " << name << "=" << name_of(value) << " is not built; built:";
  ((message << " " << name_of(kValues)), ...);
  throw std::runtime_error(message.str());
}

}  // namespace paged_ops
