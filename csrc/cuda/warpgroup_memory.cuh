// The shared memory of the prefill kernel for compute capability 9.0: what lies where, and who
// waits for whom.
#pragma once

#include <cstdint>

#include "prefill.h"
#include "ptx_sm90a.cuh"
#include "row_scores.cuh"

namespace paged_ops::cuda {

// Sizes of the kernel. All matrices in shared memory are slab matrices, see SlabMatrix.
template <typename Cache_, int kHeadSize_>
struct WarpgroupShape {
  using Cache = Cache_;
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kConsumers = 2;  // warpgroups that compute; one more fetches
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
  static constexpr int kRows = 64;  // of a warpgroup
  static constexpr int kCtaRows = kConsumers * kRows;
  static_assert(kCtaRows == kWarpgroupCtaRows);
  static constexpr int kKeys = kHeadSize <= 128 ? 128 : 64;  // of a tile
  static constexpr int kStages = 2;
  static constexpr int kSlabs = kHeadSize / 64;
  static constexpr int kQuerySlabBytes = kCtaRows * 128;
  static constexpr int kSlabBytes = kKeys * 128;
  static constexpr int kQueryBytes = kSlabs * kQuerySlabBytes;
  static constexpr int kTileBytes = kSlabs * kSlabBytes;  // of keys, or of values
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes = kAlignment + kQueryBytes + 2 * kStages * kTileBytes;
  // Of a thread. At the launch each has an equal part of the multiprocessor's 65536, in eights:
  // what one warpgroup gives back is all that the others can take.
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * (65536 / kThreads / 8 * 8));
};

// Where chunk `chunk` of 16 bytes of row `row` of a slab matrix lies.
template <int kSlabBytes>
__device__ int place_of_chunk(int row, int chunk) {
  return chunk / 8 * kSlabBytes + row * 128 + ((chunk ^ row) & 7) * 16;
}

// Slots that are filled and read in turn: item i is in slot i % kSlots.
template <int kSlots>
struct Ring {
  uint64_t full[kSlots];   // all threads that fill it have
  uint64_t empty[kSlots];  // all warps that read it have

  __device__ void begin(int filling_threads, int reading_warps) {
    for (int slot = 0; slot < kSlots; ++slot) {
      init_barrier(full[slot], filling_threads);
      init_barrier(empty[slot], reading_warps);
    }
  }
  __device__ void wait_until_full(int item) {
    wait_for_phase(full[item % kSlots], item / kSlots & 1);
  }
  __device__ void wait_until_empty(int item) {
    wait_for_phase(empty[item % kSlots], ~(item / kSlots) & 1);
  }
  __device__ uint64_t& filled(int item) { return full[item % kSlots]; }
  __device__ void release(int item, int lane) {
    if (lane == 0) arrive(empty[item % kSlots]);
  }
};

// A block of rows that a CTA has drawn; without rows: none is left.
struct Job {
  RowBlock block;
  int64_t seq;
};

// Tiles are counted through all jobs of a CTA.
template <typename Shape>
struct WarpgroupMemory {
  static constexpr int kJobs = 2;

  Ring<kJobs> jobs;
  Ring<1> queries;
  Ring<Shape::kStages> keys;
  Ring<Shape::kStages> values;
  Job job_in_slot[kJobs];

  // By one thread.
  __device__ void begin() {
    constexpr int kComputingWarps = Shape::kConsumers * kWarpgroupSize / kWarpSize;
    jobs.begin(1, kComputingWarps);
    queries.begin(kWarpgroupSize, kComputingWarps);
    keys.begin(kWarpgroupSize, kComputingWarps);
    values.begin(kWarpgroupSize, kComputingWarps);
  }
  __device__ Job& job(int index) { return job_in_slot[index % kJobs]; }
};

// The slab matrices of a CTA.
template <typename Shape>
struct SharedMatrices {
  unsigned char* query;

  __device__ static SharedMatrices of_cta() {
    unsigned char* const memory = dynamic_shared_memory();
    return {memory + (-shared_address(memory) & (Shape::kAlignment - 1))};
  }
  __device__ unsigned char* query_chunk(int row, int byte) const {
    return query + place_of_chunk<Shape::kQuerySlabBytes>(row, byte / 16) + byte % 16;
  }
  __device__ SharedAddress keys(int tile) const {
    return shared_address(query) + Shape::kQueryBytes +
           tile % Shape::kStages * 2 * Shape::kTileBytes;
  }
  __device__ SharedAddress values(int tile) const { return keys(tile) + Shape::kTileBytes; }
};

// Barriers in hardware: the first and the second warpgroup's turn to begin products, and where the
// threads that fetch meet.
inline constexpr int kFirstTurn = 1;
inline constexpr int kProducers = 3;

}  // namespace paged_ops::cuda
