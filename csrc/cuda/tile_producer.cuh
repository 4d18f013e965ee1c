// The warpgroup of the prefill kernel for compute capability 9.0 that fetches: it draws blocks of
// rows, and brings their queries, keys and values to shared memory.
#pragma once

#include <cstdint>

#include "prefill_plan.h"
#include "ptx_sm90a.cuh"
#include "query_rows.cuh"
#include "warp.cuh"
#include "warpgroup_memory.cuh"

namespace paged_ops::cuda {

// The places of a batch's blocks, which the CTAs of a launch draw one by one.
struct PlaceQueue {
  unsigned* num_drawn;  // 0 between calls
  unsigned num_places;

  // The next place; from num_places on there is none. Each CTA draws until then and no further, so
  // that the last draw of all leaves 0.
  __device__ unsigned draw() const { return draw_number(num_drawn, num_places + gridDim.x - 1); }
};

// One thread of that warpgroup. Each of its warps has a quarter of a tile's tokens, and eight lanes
// copy 128 bytes of a row.
template <typename Shape>
class TileProducer {
  using Cache = typename Shape::Cache;
  static constexpr int kWarps = kWarpgroupSize / kWarpSize;
  static constexpr int kWarpKeys = Shape::kKeys / kWarps;
  static constexpr int kRowsAtOnce = kWarpSize / 8;

 public:
  __device__ TileProducer(const AttentionParams& params, const PrefillPlan& plan,
                          const PlaceQueue& queue, WarpgroupMemory<Shape>& memory,
                          const SharedMatrices<Shape>& matrices, int thread)
      : params_(params),
        plan_(plan),
        queue_(queue),
        memory_(memory),
        matrices_(matrices),
        thread_(thread),
        warp_(thread / kWarpSize),
        lane_(thread % kWarpSize) {}

  __device__ void run() {
    if (warp_ == 0) draw();
    int first_tile = 0;
#pragma unroll 1
    for (int index = 0;; ++index) {
      if (warp_ == 0) post(index);
      sync_threads(kProducers, kWarpgroupSize);
      const Job& job = memory_.job(index);
      if (job.block.num_rows == 0) break;
      memory_.queries.wait_until_empty(index);
      load_query(job.block, memory_.queries.filled(index));
      first_tile += fetch(job, first_tile);
    }
    commit_copies();
    wait_for_copies<0>();
  }

 private:
  // Asks for a place; `post` waits for the answer. Not sooner than it is needed: who has drawn a
  // block has to compute it, though another CTA may be free before.
  __device__ void draw() {
    if (lane_ == 0) drawn_ = queue_.draw();
  }

  // By one warp: finds the block at the place that has been drawn, or at one of those after it.
  __device__ void post(int index) {
    memory_.jobs.wait_until_empty(index);
    Job job{};
    for (;; draw()) {
      const unsigned place = __shfl_sync(0xffffffffu, drawn_, 0);
      if (place >= queue_.num_places) break;
      const int kv_head = static_cast<int>(place % params_.num_kv_heads);
      job.block = plan_.blocks.at(params_, place / params_.num_kv_heads, kv_head, &job.seq);
      if (job.block.num_rows > 0) break;
    }
    if (lane_ == 0) {
      memory_.job(index) = job;
      arrive(memory_.jobs.filled(index));
    }
  }

  // Begins to copy the query rows of a block, a row to a thread.
  __device__ void load_query(const RowBlock& block, uint64_t& filled) const {
    if (plan_.wide_query) {
      constexpr int kWarpRows = Shape::kCtaRows / kWarps;
      static_assert(kWarpRows == kWarpSize);
      const bool present = thread_ < block.num_rows;
      const int64_t from = reinterpret_cast<int64_t>(plan_.query_row(params_, block, thread_));
      load<kWarpRows, Shape::kQuerySlabBytes>(present ? from : -1, shared_address(matrices_.query));
      arrive_after_copies(filled);
    } else {
      const QueryRows<Shape::kHeadSize, Shape::kCtaRows, kWarpgroupSize> rows{params_, plan_, block,
                                                                              0, thread_};
      rows.load([&](int row, int byte) { return matrices_.query_chunk(row, byte); });
      show_to_matrix_units();
      arrive(filled);
    }
  }

  // Begins to copy all keys and values of a job, and asks for the next place when the last values
  // are all that is left; returns how many tiles there are.
  __device__ int fetch(const Job& job, int first_tile) {
    tiles_ = TileRange<Shape::kKeys>::of(params_, job.block);
    blocks_ = params_.block_table + job.seq * params_.block_table_stride;
    key_head_ = params_.key_cache.stride_head * job.block.kv_head;
    value_head_ = params_.value_cache.stride_head * job.block.kv_head;
    int64_t key = -1, value = -1;
    look_up(0);
    // The values of a tile are needed when the next tile's keys have been multiplied.
#pragma unroll 1
    for (int tile = 0; tile <= tiles_.count; ++tile) {
      const int in_ring = first_tile + tile;
      const int64_t value_before = value;
      if (tile < tiles_.count) {
        key = address_of(params_.key_cache, key_head_, tile);
        value = address_of(params_.value_cache, value_head_, tile);
        look_up(tile + 1);
        memory_.keys.wait_until_empty(in_ring);
        load<kWarpKeys, Shape::kSlabBytes>(key, matrices_.keys(in_ring));
        arrive_after_copies(memory_.keys.filled(in_ring));
      } else if (warp_ == 0) {
        draw();
      }
      if (tile > 0) {
        memory_.values.wait_until_empty(in_ring - 1);
        load<kWarpKeys, Shape::kSlabBytes>(value_before, matrices_.values(in_ring - 1));
        arrive_after_copies(memory_.values.filled(in_ring - 1));
      }
    }
    return tiles_.count;
  }

  __device__ int32_t key_of_lane(int tile) const {
    return tiles_.first_key(tile) + warp_ * kWarpKeys + lane_ % kWarpKeys;
  }

  // Asks for the block of the lane's token in a tile; negative: there is no such token.
  __device__ void look_up(int tile) {
    const int32_t key = key_of_lane(tile);
    const bool present = tiles_.contains(key);
    block_ = present ? load_fresh(blocks_ + plan_.block_size.quotient(key)) : -1;
  }

  // Of the row of the token that has been looked up; negative: there is none.
  __device__ int64_t address_of(const CacheHalf<const void*>& half, int64_t head, int tile) const {
    const int64_t slot = plan_.block_size.remainder(key_of_lane(tile));
    const int64_t element = head + block_ * half.stride_block + slot * half.stride_slot;
    return block_ < 0 ? -1
                      : reinterpret_cast<int64_t>(half.data) +
                            element * static_cast<int64_t>(sizeof(Cache));
  }

  // Begins to copy the warp's rows of a matrix, whose addresses the lanes have. Zeros where there
  // is no such row, and past the end of the head.
  template <int kWarpRows, int kSlabBytes>
  __device__ void load(int64_t address, SharedAddress matrix) const {
    const int column = lane_ % 8 * 16, in_round = lane_ / 8;
#pragma unroll
    for (int round = 0; round < kWarpRows / kRowsAtOnce; ++round) {
      const int row = round * kRowsAtOnce + in_round;
      const int64_t begin = __shfl_sync(0xffffffffu, address, row), from = begin + column;
      const bool present = static_cast<int32_t>(begin >> 32) >= 0;
      const SharedAddress to =
          matrix + place_of_chunk<kSlabBytes>(warp_ * kWarpRows + row, lane_ % 8);
#pragma unroll
      for (int slab = 0; slab < Shape::kSlabs; ++slab) {
        const bool in_head =
            slab * 128 + column < params_.head_size * static_cast<int>(sizeof(Cache));
        copy_async_16(to + slab * kSlabBytes, reinterpret_cast<const void*>(from + slab * 128),
                      present && in_head);
      }
    }
  }

  const AttentionParams& params_;
  const PrefillPlan& plan_;
  const PlaceQueue& queue_;
  WarpgroupMemory<Shape>& memory_;
  const SharedMatrices<Shape> matrices_;
  const int thread_;
  const int warp_;
  const int lane_;
  unsigned drawn_ = 0;  // by lane 0 of the first warp
  // Of the job whose tiles are fetched:
  TileRange<Shape::kKeys> tiles_;
  const int32_t* blocks_;
  int64_t key_head_;  // elements before the head in a token
  int64_t value_head_;
  int32_t block_ = -1;
};

}  // namespace paged_ops::cuda
