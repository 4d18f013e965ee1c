// One way to start a kernel: the grid is checked against the hardware's limits, and what goes wrong
// is raised, never left behind for somebody else's next call.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace paged_ops::cuda {

// CTAs along x and y.
struct Grid {
  int64_t x;
  int64_t y = 1;
};

inline constexpr int64_t kMaxGridX = 0x7fffffff;
inline constexpr int64_t kMaxGridY = 0xffff;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void require_success(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // raised here, so not to be found again by a later check
  throw std::runtime_error(std::string("paged::") + op +
                           ": CUDA error: " + cudaGetErrorString(error));
}

// What the runtime is asked about a kernel or told of it: once for each device, since that takes as
// long as a launch.
template <auto kKernel>
class KernelOnDevice {
 public:
  static KernelOnDevice& current(const char* op) {
    static KernelOnDevice of_device[kMaxDevices];
    int device = 0;
    require_success(op, cudaGetDevice(&device));
    if (device >= kMaxDevices) throw std::runtime_error("paged_ops: too many devices");
    return of_device[device];
  }

  // Lets the kernel have so much dynamic shared memory.
  void allow_shared_memory(const char* op, int bytes) {
    if (allowed_.load(std::memory_order_relaxed) >= bytes) return;
    require_success(
        op, cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    allowed_.store(bytes, std::memory_order_relaxed);
  }

  // True for code that waits for the previous kernel itself, see wait_for_previous_kernel: a newer
  // device may run code that was compiled for an older one.
  bool waits(const char* op) {
    constexpr int kFirstThatWaits = 90;
    return asked(op, ptx_version_) >= kFirstThatWaits;
  }

  // False where the body of a kernel is left out of the code for the device, because it lacks the
  // instructions. For kernels that declare shared memory, not a multiple of 1 KB: what the hardware
  // reserves in each CTA may or may not be counted in.
  bool has_body(const char* op) {
    constexpr int kReserved = 1024;
    return asked(op, declared_) % kReserved != 0;
  }

 private:
  static constexpr int kUnknown = -1;

  int asked(const char* op, const std::atomic<int>& property) {
    if (property.load(std::memory_order_relaxed) == kUnknown) {
      cudaFuncAttributes attributes{};
      require_success(op, cudaFuncGetAttributes(&attributes, kKernel));
      ptx_version_.store(attributes.ptxVersion, std::memory_order_relaxed);
      declared_.store(static_cast<int>(attributes.sharedSizeBytes), std::memory_order_relaxed);
    }
    return property.load(std::memory_order_relaxed);
  }

  std::atomic<int> allowed_{0};
  std::atomic<int> ptx_version_{kUnknown};
  std::atomic<int> declared_{kUnknown};  // shared memory, bytes
};

// An empty grid launches nothing. `shared_bytes` is shared memory on top of what the kernel
// declares.
template <auto kKernel, typename... Params>
void launch(const char* op, Grid grid, int threads, int shared_bytes, cudaStream_t stream,
            const Params&... params) {
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x > kMaxGridX || grid.y > kMaxGridY) {
    throw std::runtime_error(std::string("paged::") + op + ": too large for one launch, needs " +
                             std::to_string(grid.x) + " x " + std::to_string(grid.y) + " CTAs");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  auto& kernel = KernelOnDevice<kKernel>::current(op);
  kernel.allow_shared_memory(op, shared_bytes);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = kernel.waits(op) ? 1 : 0;
  require_success(op, cudaLaunchKernelEx(&config, kKernel, params...));
}

template <auto kKernel, typename... Params>
void launch(const char* op, Grid grid, int threads, cudaStream_t stream, const Params&... params) {
  launch<kKernel>(op, grid, threads, 0, stream, params...);
}

}  // namespace paged_ops::cuda
