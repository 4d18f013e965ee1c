#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace paged_ops::cpu {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
#endif

namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
const bool kHasAvx512 = kHasAvx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
#endif

// Best first.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {&kAvx512Bf16Kernels, kHasAvx512 && __builtin_cpu_supports("avx512bf16")},
    {&kAvx512Kernels, kHasAvx512},
    {&kAvx2Kernels, kHasAvx2},
#endif
    {&kScalarKernels, true},
};

const Kernels& choose() {
  const char* const wish = std::getenv("PAGED_OPS_CPU");
  for (const InstructionSet& set : kInstructionSets) {
    const bool wanted = wish == nullptr || *wish == '\0' || std::string(wish) == set.kernels->name;
    if (set.supported && wanted) return *set.kernels;
  }
  throw std::runtime_error("paged_ops: PAGED_OPS_CPU must be one of: " + supported_kernels() +
                           "; got " + wish);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::string supported_kernels() {
  std::string names;
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.supported) continue;
    if (!names.empty()) names += ' ';
    names += set.kernels->name;
  }
  return names;
}

}  // namespace paged_ops::cpu
