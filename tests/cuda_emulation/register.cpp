// The emulated CUDA kernels in the place of the CPU backend.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/value_checks.h"
#include "operators.h"

namespace paged_ops::cuda {
namespace {

// A small device, so that sequences are cut. EMULATED_SHARED_MEMORY: of a CTA, in KB.
DeviceLimits limits() {
  const char* const given = std::getenv("EMULATED_SHARED_MEMORY");
  const int kilobytes = given == nullptr ? 227 : std::atoi(given);
  return {3, (kilobytes + 1) << 10, kilobytes << 10};
}

struct Emulated {
  static void run(const AttentionParams& params, const Tensor&) {
    check_values(params, nullptr);
    const AttentionPlan plan = plan_attention(params, limits());
    std::vector<float> memory(plan.scratch_bytes / sizeof(float) + 4, NAN);
    std::vector<unsigned> counters(plan.num_counters);
    run_attention(params, plan, {memory.data(), counters.data()}, nullptr);
    for (const unsigned counter : counters) {
      if (counter != 0) throw std::runtime_error("a counter was not left at 0");
    }
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
