#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace paged_ops::cpu {

extern const Kernels kScalarKernels;

namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool supported;
};

const InstructionSet kInstructionSets[] = {
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
