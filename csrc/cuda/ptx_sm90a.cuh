// One wrapper for each PTX instruction that only compute capability 9.0 has, or that is used there
// alone: matrix products of whole warpgroups out of shared memory, and what goes with them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

// Whether this pass of the compiler, for the host or for one architecture, knows the instructions.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PAGED_OPS_SM90A 1
#else
#define PAGED_OPS_SM90A 0
#endif

namespace paged_ops::cuda {

inline constexpr int kWarpgroupSize = 128;

// A barrier in shared memory: a phase ends when `arrivals` threads have arrived, and the next one
// begins.
__device__ inline void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives as soon as the copies that this thread has begun are there; does not wait for them.
__device__ inline void arrive_after_copies(uint64_t& barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
      : "memory");
}

// Waits for the end of the current phase if that has this parity; else of the one before, which is
// over.
__device__ inline void wait_for_phase(uint64_t& barrier, int parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}

// Of the CTA's 16 barriers in hardware, 0 being that of __syncthreads: waits for `threads` threads,
// those counted that only arrive.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Gives registers of the calling warpgroup back, or takes some that others have given back.
template <int kRegisters>
__device__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What this thread knows to be in shared memory is there for matrix products too.
__device__ inline void show_to_matrix_units() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A matrix of 16-bit elements in shared memory, in slabs of 64 columns that lie `slab_bytes` apart:
// rows of 128 bytes, of which row r has chunk c, of 16 bytes, in place c ^ (r % 8). The slabs begin
// at multiples of 1024 bytes.
struct SlabMatrix {
  uint64_t descriptor;

  __device__ static SlabMatrix at(SharedAddress slabs, int slab_bytes) {
    constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
    return {static_cast<uint64_t>(slabs >> 4) | static_cast<uint64_t>(slab_bytes >> 4) << 16 |
            kEightRows << 32 | kSwizzle128 << 62};
  }

  // A part that begins `bytes` later.
  __device__ SlabMatrix from(int bytes) const {
    return {descriptor + static_cast<uint64_t>(bytes >> 4)};
  }
};

// Before the first product of a group: what the threads have written to its registers counts.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends the group of products since the last call.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups are under way.
template <int kPending>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers that products write across this point.
template <int kParts>
__device__ void pin(float (&sums)[kParts][4]) {
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[n][i])::"memory");
  }
}

// Products that go on in the background. 64 rows, of which each warp has 16: the sums c[n] are
// columns 8 n and on, laid out like those of multiply_add, as are the elements of `a` that come
// from registers. `b` is a slab matrix.
//
// multiply_rows_async: c = a * b^T or c += a * b^T, for 16 columns of 64 rows of `a` and kColumns
// rows of `b`.
// multiply_columns_async: c += a * b, for 16 rows and kColumns columns of `b`.
#define SUM(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_64 SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#define SUMS_128 SUMS_64, SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)
#define NAMES_32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                            \
  NAMES_32                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ROWS_PRODUCT(columns, type, names, a, b, add)                                            \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " add                                                    \
  ", 0;\n"                                                                                       \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " a ", " b \
  ", add, 1, 1, 0, 0;\n}"
#define COLUMNS_PRODUCT(columns, type, names, a, b)                                                \
  "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                   \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, {" a "}, " b \
  ", add, 1, 1, 1;\n}"

template <typename Number, int kColumns>
__device__ void multiply_rows_async(float (*c)[4], SlabMatrix a, SlabMatrix b, bool add) {
  static_assert(kColumns == 64 || kColumns == 128);
  constexpr bool kBFloat16 = std::is_same_v<Number, __nv_bfloat16>;
  const int plus = add ? 1 : 0;
  if constexpr (kColumns == 64 && kBFloat16) {
    asm volatile(ROWS_PRODUCT("64", "bf16", NAMES_32, "%32", "%33", "%34")
                 : SUMS_64
                 : "l"(a.descriptor), "l"(b.descriptor), "r"(plus));
  } else if constexpr (kColumns == 64) {
    asm volatile(ROWS_PRODUCT("64", "f16", NAMES_32, "%32", "%33", "%34")
                 : SUMS_64
                 : "l"(a.descriptor), "l"(b.descriptor), "r"(plus));
  } else if constexpr (kBFloat16) {
    asm volatile(ROWS_PRODUCT("128", "bf16", NAMES_64, "%64", "%65", "%66")
                 : SUMS_128
                 : "l"(a.descriptor), "l"(b.descriptor), "r"(plus));
  } else {
    asm volatile(ROWS_PRODUCT("128", "f16", NAMES_64, "%64", "%65", "%66")
                 : SUMS_128
                 : "l"(a.descriptor), "l"(b.descriptor), "r"(plus));
  }
}

template <typename Number, int kColumns>
__device__ void multiply_columns_async(float (*c)[4], const uint32_t (&a)[4], SlabMatrix b) {
  static_assert(kColumns == 64 || kColumns == 128);
  constexpr bool kBFloat16 = std::is_same_v<Number, __nv_bfloat16>;
  if constexpr (kColumns == 64 && kBFloat16) {
    asm volatile(COLUMNS_PRODUCT("64", "bf16", NAMES_32, "%32, %33, %34, %35", "%36")
                 : SUMS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor));
  } else if constexpr (kColumns == 64) {
    asm volatile(COLUMNS_PRODUCT("64", "f16", NAMES_32, "%32, %33, %34, %35", "%36")
                 : SUMS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor));
  } else if constexpr (kBFloat16) {
    asm volatile(COLUMNS_PRODUCT("128", "bf16", NAMES_64, "%64, %65, %66, %67", "%68")
                 : SUMS_128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor));
  } else {
    asm volatile(COLUMNS_PRODUCT("128", "f16", NAMES_64, "%64, %65, %66, %67", "%68")
                 : SUMS_128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor));
  }
}

#undef SUM
#undef SUMS_64
#undef SUMS_128
#undef NAMES_32
#undef NAMES_64
#undef ROWS_PRODUCT
#undef COLUMNS_PRODUCT

}  // namespace paged_ops::cuda
