// The emulated CUDA kernels in the place of the CPU backend.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/value_checks.h"
#include "operators.h"

namespace paged_ops::cuda {
namespace {

int from_environment(const char* name, int otherwise) {
  const char* const given = std::getenv(name);
  return given == nullptr ? otherwise : std::atoi(given);
}

// A small device, so that sequences are cut.
DeviceLimits limits() {
  const int kilobytes = from_environment("EMULATED_SHARED_MEMORY", 227);  // of a CTA
  const int multiprocessors = from_environment("EMULATED_MULTIPROCESSORS", 3);
  return {multiprocessors, (kilobytes + 1) << 10, kilobytes << 10, 25e9f * multiprocessors};
}

struct Emulated {
  static void run(const AttentionParams& params, const Device&) {
    check_values(params, nullptr);
    const AttentionPlan plan = plan_attention(params, limits());
    const size_t size = plan.scratch_bytes / sizeof(float);
    std::vector<float> memory(size + 4096, NAN);
    std::vector<unsigned> counters(plan.num_counters);
    run_attention(params, plan, {memory.data(), counters.data()}, nullptr);
    for (const unsigned counter : counters) {
      if (counter != 0) throw std::runtime_error("a counter was not left at 0");
    }
    for (size_t i = size; i < memory.size(); ++i) {
      if (!std::isnan(memory[i])) throw std::runtime_error("wrote past the scratch memory");
    }
  }
  static void run(const WriteKvParams& params, const Device&) {
    check_values(params, nullptr);
    run_write_kv(params, nullptr);
  }
  static void run(const CopyBlocksParams& params, const Device&) {
    check_values(params, nullptr);
    run_copy_blocks(params, nullptr);
  }
  static void run(const MergeStatesParams& params, const Device&) {
    run_merge_states(params, nullptr);
  }
};

}  // namespace
}  // namespace paged_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  paged_ops::register_operators<paged_ops::cuda::Emulated>(m);
}
