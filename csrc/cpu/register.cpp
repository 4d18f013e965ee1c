// The CPU backend: values are checked, then the table of the chosen instruction set runs.
#include "../operators.h"
#include "isa.h"
#include "value_checks.h"

namespace paged_ops::cpu {
namespace {

struct Cpu {
  static void run(const AttentionParams& params, const Device&) {
    check_values(params);
    kernels().attention(params);
  }
  static void run(const WriteKvParams& params, const Device&) {
    check_values(params);
    kernels().write_kv(params);
  }
  static void run(const CopyBlocksParams& params, const Device&) {
    check_values(params);
    kernels().copy_blocks(params);
  }
  static void run(const MergeStatesParams& params, const Device&) {
    kernels().merge_states(params);
  }
};

}  // namespace
}  // namespace paged_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) { paged_ops::register_operators<paged_ops::cpu::Cpu>(m); }
