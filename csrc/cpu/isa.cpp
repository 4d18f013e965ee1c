#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace paged_ops::cpu {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;
#endif

namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// A process has to ask Linux for the tile registers before any of its threads uses them, and may be
// refused (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && may_use_tiles();
}
#endif

// Best first.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {&kAmxKernels, has_amx},
    {&kAvx512Bf16Kernels, has_avx512bf16},
    {&kAvx512Kernels, has_avx512},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kScalarKernels, [] { return true; }},
};

const Kernels& choose() {
  const char* const wish = std::getenv("PAGED_OPS_CPU");
  for (const InstructionSet& set : kInstructionSets) {
    const bool wanted = wish == nullptr || *wish == '\0' || std::string(wish) == set.kernels->name;
    if (wanted && set.supported()) return *set.kernels;
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
    if (!set.supported()) continue;
    if (!names.empty()) names += ' ';
    names += set.kernels->name;
  }
  return names;
}

}  // namespace paged_ops::cpu
