// One way to start a kernel: the grid is checked against the hardware's limits, and what goes wrong
// is raised, never left behind for somebody else's next call.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

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

// Lets a kernel have so much dynamic shared memory. To ask costs as much as a launch, so it is done
// once for a kernel, a device and the most that has been needed.
template <auto kKernel>
void allow_shared_memory(const char* op, int bytes) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> allowed[kMaxDevices];
  int device = 0;
  require_success(op, cudaGetDevice(&device));
  if (device < kMaxDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  require_success(
      op, cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (device < kMaxDevices) allowed[device].store(bytes, std::memory_order_relaxed);
}

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
  if (shared_bytes > 0) allow_shared_memory<kKernel>(op, shared_bytes);
  require_success(op, cudaLaunchKernelEx(&config, kKernel, params...));
}

template <auto kKernel, typename... Params>
void launch(const char* op, Grid grid, int threads, cudaStream_t stream, const Params&... params) {
  launch<kKernel>(op, grid, threads, 0, stream, params...);
}

}  // namespace paged_ops::cuda
