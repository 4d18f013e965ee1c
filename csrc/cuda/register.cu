// The CUDA half of the operators: the device and the stream to run on, and the registration.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../operators.h"
#include "device.h"
#include "kernels.h"
#include "value_checks.h"

namespace paged_ops::cuda {
namespace {

// The stream that torch runs on now. The one symbol of libtorch_cuda that is needed is looked up at
// the first call, not linked: the same library then loads beside a torch without CUDA.
cudaStream_t current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get_stream == nullptr) throw std::runtime_error("paged_ops: this torch has no CUDA support");
  void* stream = nullptr;
  if (get_stream(device, &stream) != 0) {
    throw std::runtime_error("paged_ops: no current stream on CUDA device " +
                             std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

// Makes a device the current one, and back, and knows the stream to enqueue on.
class Place {
 public:
  explicit Place(const Device& device) : device_(device.index), stream_(current_stream(device_)) {
    // A guard takes twice as long as the question.
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device_) guard_.emplace(device_);
  }
  cudaStream_t stream() const { return stream_; }
  int device() const { return device_; }

 private:
  int32_t device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
};

struct Cuda {
  static void run(const AttentionParams& params, const Device& device) {
    const Place place(device);
    check_values(params, place.stream());
    const AttentionPlan plan = plan_attention(params, device_limits(place.device()));
    Scratch scratch =
        kept_scratch(plan.scratch_bytes, plan.num_counters, place.device(), place.stream());
    OwnedTensor memory;
    if (scratch.memory == nullptr && plan.scratch_bytes > 0) {
      // It may be given back before the kernel has run: what gets it runs later on the stream.
      memory =
          new_tensor({static_cast<int64_t>(plan.scratch_bytes)}, aoti_torch_dtype_uint8(), device);
      scratch.memory = mutable_data(memory);
    }
    run_attention(params, plan, scratch, place.stream());
  }
  static void run(const WriteKvParams& params, const Device& device) {
    const Place place(device);
    check_values(params, place.stream());
    run_write_kv(params, place.stream());
  }
  static void run(const CopyBlocksParams& params, const Device& device) {
    const Place place(device);
    check_values(params, place.stream());
    run_copy_blocks(params, place.stream());
  }
  static void run(const MergeStatesParams& params, const Device& device) {
    run_merge_states(params, Place(device).stream());
  }
};

}  // namespace
}  // namespace paged_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(paged, CUDA, m) {
  paged_ops::register_operators<paged_ops::cuda::Cuda>(m);
}
