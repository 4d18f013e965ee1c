// One wrapper for each PTX instruction that has no intrinsic. But for the first two, all of them
// are there from sm_80 on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace paged_ops::cuda {

// The first statement of every kernel (but see wait_where_needed): `launch` starts it while the one
// before it on the stream may still run. Waits until that has ended and what it wrote can be read.
// Devices below compute capability 9.0 start kernels in order.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start where there is room, once all CTAs have said so. Without, it starts
// when this one ends. Those of the attention kernels stay without, for what comes after the call: a
// kernel that reads past the first-level cache, as a product of matrices does, would start with
// what the attention's shared memory leaves of that cache.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Past the first-level cache, where a kernel that does not wait may find what was there before.
template <typename Word>
__device__ Word load_fresh(const Word* from) {
  return __ldcg(from);
}

// An address in shared memory, in bytes.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// The shared memory whose size the launch gives.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Copies 16 bytes in the background, past L1; zeros where there is nothing to read: `from` may then
// point anywhere.
__device__ inline void copy_async_16(SharedAddress to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}

// How lines are kept in the second-level cache: these are the first to go.
using CachePolicy = uint64_t;
__device__ inline CachePolicy evict_first() {
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The same as copy_async_16, for what is not read again soon.
__device__ inline void copy_async_16(SharedAddress to, const void* from, bool present,
                                     CachePolicy policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
      "l"(from), "r"(present ? 16 : 0), "l"(policy)
      : "memory");
}

// Ends the group of copies since the last call.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are still on their way.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Counts from 0 to `most` and then from 0 again, and returns the count before. What was written
// before, by whomever this thread has met at a barrier, can be read by who counts later.
__device__ inline unsigned count_arrival(unsigned* counter, unsigned most) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(most)
               : "memory");
  return before;
}

// Counts likewise, but orders nothing: for a number that is all that matters.
__device__ inline unsigned draw_number(unsigned* counter, unsigned most) {
  return atomicInc(counter, most);
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and
// gets elements 2 * (l % 4) and the next of row l / 4 of each matrix.
__device__ inline void load_matrices(SharedAddress row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(SharedAddress row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// The transpose of an 8 x 8 matrix of 16-bit elements: lane l gives elements 2 * (l % 4) and the
// next of row l / 4, and gets those of column l / 4.
__device__ inline uint32_t transpose_matrix(uint32_t row) {
  uint32_t column;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

// c += a * b for a [16, 16] (row-major fragments) and b [16, 8] (column-major), sums in float32.
__device__ inline void multiply_add(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4],
                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to about 2 units in the last place; 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace paged_ops::cuda
