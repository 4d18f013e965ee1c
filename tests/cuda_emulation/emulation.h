// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU: included
// before a .cu file, it makes a C++ compiler take it. One fiber for each thread of a CTA, CTAs one
// after another; barriers and shuffles switch fibers. A barrier that some threads never reach is
// found and aborts. Copies and products go on in the background (background.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <cstdint>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "background.h"

#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __noinline__
#define __noinline__ [[gnu::noinline]]
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

void sync_cta();
void sync_warp();
// At one of the CTA's other barriers; without `wait` it is only told that this thread was there.
void sync_threads(int barrier, int threads, bool wait);
// For threads that wait for something else: lets others run; says that something has changed.
void yield();
void progress();
// What each lane of the warp has passed; the number of the own lane.
int gather(unsigned long mine, unsigned long (&all)[32]);
unsigned char* dynamic_shared_memory();
[[noreturn]] void fail(const char* what);
[[noreturn]] void trap();
// False if a thread trapped.
bool run(dim3 grid, dim3 cta, size_t shared_bytes, const std::function<void()>& kernel);

// Of a device that multiplies whole warpgroups, if EMULATED_WGMMA is set: by declared shared memory
// the host tells.
template <typename Kernel>
cudaError_t get_attributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  attributes->sharedSizeBytes = std::getenv("EMULATED_WGMMA") == nullptr ? 0 : 1;
  return cudaSuccess;
}

// Whether the kernel has waited for the one before it: each has to, since it may be started early.
inline bool waited;

template <typename... Params, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                   const Arguments&... arguments) {
  waited = false;
  const bool done = run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                        [&] { kernel(arguments...); });
  if (!waited) fail("a kernel has not waited for the one before it");
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

inline void __syncwarp() { emulation::sync_warp(); }
inline void __syncthreads() { emulation::sync_cta(); }
template <typename Number>
Number exchange(unsigned mask, Number x, int (*source)(int lane, int by), int by) {
  static_assert(sizeof(Number) <= sizeof(unsigned long));
  if (mask != ~0u) std::abort();
  unsigned long bits = 0, all[32];
  std::memcpy(&bits, &x, sizeof(x));
  const int lane = emulation::gather(bits, all);
  std::memcpy(&x, &all[source(lane, by)], sizeof(x));
  return x;
}
template <typename Number>
Number __shfl_xor_sync(unsigned mask, Number x, int distance) {
  return exchange(mask, x, [](int lane, int by) { return lane ^ by; }, distance);
}
template <typename Number>
Number __shfl_up_sync(unsigned mask, Number x, int distance) {
  return exchange(mask, x, [](int lane, int by) { return lane < by ? lane : lane - by; }, distance);
}
template <typename Number>
Number __shfl_sync(unsigned mask, Number x, int from) {
  return exchange(mask, x, [](int, int by) { return by; }, from);
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  if (mask != ~0u) std::abort();
  unsigned long all[32];
  emulation::gather(x, all);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>(static_cast<uint64_t>(x) * y >> 32);
}
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long bytes = x | static_cast<unsigned long>(y) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
[[noreturn]] inline void __trap() { emulation::trap(); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }

#define cudaGetDevice(...) cudaSuccess
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaFuncGetAttributes emulation::get_attributes
#define cudaLaunchKernelEx emulation::launch
#define cudaGetLastError() ((void)0)
#define cudaGetErrorString(error) "a thread trapped"
