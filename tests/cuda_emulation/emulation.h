// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU: included
// before a .cu file, it makes a C++ compiler take it. One fiber for each thread of a CTA, CTAs one
// after another; barriers and shuffles switch fibers. A barrier that some threads never reach is
// found and aborts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

void sync_cta();
void sync_warp();
float shuffle_xor(float x, int distance);
[[noreturn]] void trap();
// False if a thread trapped.
bool run(dim3 grid, dim3 cta, const std::function<void()>& kernel);

template <typename... Params, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                   const Arguments&... arguments) {
  const bool done = run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

inline void __syncthreads() { emulation::sync_cta(); }
inline float __shfl_xor_sync(unsigned mask, float x, int distance) {
  if (mask != ~0u) std::abort();
  return emulation::shuffle_xor(x, distance);
}
[[noreturn]] inline void __trap() { emulation::trap(); }
inline int min(int a, int b) { return a < b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }

#define cudaLaunchKernelEx emulation::launch
#define cudaGetLastError() ((void)0)
#define cudaGetErrorString(error) "a thread trapped"
