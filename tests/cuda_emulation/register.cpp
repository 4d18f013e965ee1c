// The emulated CUDA kernels in the place of the CPU backend.
#include "cuda/kernels.h"
#include "cuda/value_checks.h"
#include "operators.h"

namespace paged_ops::cuda {
namespace {

struct Emulated {
  static void run(const AttentionParams& params, const Tensor&) {
    check_values(params, nullptr);
    run_attention(params, nullptr);
  }
  static void run(const WriteKvParams& params, const Tensor&) {
    check_values(params, nullptr);
    run_write_kv(params, nullptr);
  }
  static void run(const CopyBlocksParams& params, const Tensor&) {
    check_values(params, nullptr);
    run_copy_blocks(params, nullptr);
  }
  static void run(const MergeStatesParams& params, const Tensor&) {
    run_merge_states(params, nullptr);
  }
};

}  // namespace
}  // namespace paged_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  paged_ops::register_operators<paged_ops::cuda::Emulated>(m);
}
