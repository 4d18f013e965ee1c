// Which kernels run: the best that the machine has, or the one PAGED_OPS_CPU names.
#pragma once

#include <string>

#include "kernels.h"

namespace paged_ops::cpu {

// The table that is in use, chosen at the first call. Raises std::runtime_error if PAGED_OPS_CPU
// names something that is unknown or that this machine lacks.
const Kernels& kernels();

// What this machine can run, best first: "amx avx512bf16 avx512 avx2 scalar".
std::string supported_kernels();

}  // namespace paged_ops::cpu
