// The prefill kernel for compute capability 9.0, whose matrix units want whole warpgroups and
// operands in shared memory: FlashAttention-3 (Shah et al., 2024) over a paged cache.
//
// A CTA takes 128 of the rows of one KV head: all query heads of the group share its keys and
// values. Two warpgroups compute 64 rows each. A third one, with hardly any registers, fetches keys
// and values into a ring of tiles, up to two tiles ahead: blocks of a few tokens are too small for
// the tensor copy engine, so it looks up the block table and copies 16 bytes at a time.
//
// A warpgroup begins to multiply a tile's keys, and the weights of the tile before with the values,
// and computes exponentials of the former while the latter goes on. The two take turns in beginning
// products, so that one computes exponentials while the other multiplies.
//
// A block of rows depends on its sequence alone, and all its keys are added up by one CTA in their
// order: the result depends neither on the rest of the batch nor on timing.
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "fragments.cuh"
#include "heuristics.h"
#include "launch.h"
#include "prefill.h"
#include "prefill_plan.h"
#include "ptx_sm90a.cuh"
#include "query_rows.cuh"
#include "row_blocks.cuh"
#include "row_output.cuh"
#include "row_scores.cuh"
#include "row_softmax.cuh"

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
  // Of a thread: 65536 of a multiprocessor.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};

// Where chunk `chunk` of 16 bytes of row `row` of a slab matrix lies.
template <int kSlabBytes>
__device__ int place_of_chunk(int row, int chunk) {
  return chunk / 8 * kSlabBytes + row * 128 + ((chunk ^ row) & 7) * 16;
}

// A ring of tiles of keys, or of values.
template <int kStages>
struct TileRing {
  uint64_t full[kStages];   // all threads that fetch have
  uint64_t empty[kStages];  // all warps that compute have read it

  __device__ void begin(int fetching_threads, int computing_warps) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(full[stage], fetching_threads);
      init_barrier(empty[stage], computing_warps);
    }
  }
  __device__ void wait_until_full(int tile) {
    wait_for_phase(full[tile % kStages], tile / kStages & 1);
    show_to_matrix_units();
  }
  __device__ void wait_until_empty(int tile) {
    wait_for_phase(empty[tile % kStages], ~(tile / kStages) & 1);
  }
  __device__ void release(int tile, int lane) {
    if (lane == 0) arrive(empty[tile % kStages]);
  }
};

template <typename Shape>
struct WarpgroupMemory {
  TileRing<Shape::kStages> keys;
  TileRing<Shape::kStages> values;
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

// One thread of the warpgroup that fetches. Each of its warps has a quarter of a tile's tokens, and
// eight lanes copy 128 bytes of a row.
template <typename Shape>
class TileProducer {
  using Cache = typename Shape::Cache;
  static constexpr int kWarpKeys = Shape::kKeys / 4;
  static constexpr int kRowsAtOnce = kWarpSize / 8;

 public:
  __device__ TileProducer(const AttentionParams& params, const PrefillPlan& plan, int64_t seq,
                          int kv_head, const TileRange<Shape::kKeys>& tiles, int thread)
      : params_(params),
        plan_(plan),
        tiles_(tiles),
        blocks_(params.block_table + seq * params.block_table_stride),
        lane_(thread % kWarpSize),
        first_row_(thread / kWarpSize * kWarpKeys) {
    key_head_ = params.key_cache.stride_head * kv_head;
    value_head_ = params.value_cache.stride_head * kv_head;
  }

  __device__ void run(WarpgroupMemory<Shape>& memory, const SharedMatrices<Shape>& matrices) {
    int64_t key = -1, value = -1;
    look_up(0);
    // The values of a tile are needed when the next tile's keys have been multiplied.
#pragma unroll 1
    for (int tile = 0; tile <= tiles_.count; ++tile) {
      const int64_t value_before = value;
      if (tile < tiles_.count) {
        key = address_of(params_.key_cache, key_head_, tile);
        value = address_of(params_.value_cache, value_head_, tile);
        look_up(tile + 1);
        memory.keys.wait_until_empty(tile);
        load(key, matrices.keys(tile));
        arrive_after_copies(memory.keys.full[tile % Shape::kStages]);
      }
      if (tile > 0) {
        memory.values.wait_until_empty(tile - 1);
        load(value_before, matrices.values(tile - 1));
        arrive_after_copies(memory.values.full[(tile - 1) % Shape::kStages]);
      }
    }
    commit_copies();
    wait_for_copies<0>();
  }

 private:
  __device__ int32_t key_of_lane(int tile) const {
    return tiles_.first_key(tile) + first_row_ + lane_ % kWarpKeys;
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

  // Begins to copy the warp's rows of a tile, whose addresses the lanes have. Zeros where there is
  // no token, and past the end of the head.
  __device__ void load(int64_t address, SharedAddress tile) const {
    const int column = lane_ % 8 * 16, in_round = lane_ / 8;
#pragma unroll
    for (int round = 0; round < kWarpKeys / kRowsAtOnce; ++round) {
      const int row = round * kRowsAtOnce + in_round;
      const int64_t token = __shfl_sync(0xffffffffu, address, row), from = token + column;
      const bool present = static_cast<int32_t>(token >> 32) >= 0;
      const SharedAddress to =
          tile + place_of_chunk<Shape::kSlabBytes>(first_row_ + row, lane_ % 8);
#pragma unroll
      for (int slab = 0; slab < Shape::kSlabs; ++slab) {
        const bool in_head =
            slab * 128 + column < params_.head_size * static_cast<int>(sizeof(Cache));
        copy_async_16(to + slab * Shape::kSlabBytes,
                      reinterpret_cast<const void*>(from + slab * 128), present && in_head);
      }
    }
  }

  const AttentionParams& params_;
  const PrefillPlan& plan_;
  const TileRange<Shape::kKeys> tiles_;
  const int32_t* const blocks_;
  const int lane_;
  const int first_row_;  // of the warp, in a tile
  int64_t key_head_;     // elements before the head in a token
  int64_t value_head_;
  int32_t block_ = -1;
};

// Barriers in hardware, two each, for the first and the second warpgroup: its turn to begin
// products, and its query is there.
inline constexpr int kFirstTurn = 1;
inline constexpr int kFirstQuery = 3;

// One thread of a warpgroup that computes, and what its rows have gathered.
template <typename Shape>
struct WarpgroupRows {
  using Number = typename Shape::Cache;
  static constexpr int kHeadSize = Shape::kHeadSize;
  static constexpr int kKeys = Shape::kKeys;

  const AttentionParams& params;
  const RowBlock& block;
  const TileRange<Shape::kKeys>& tiles;
  WarpgroupMemory<Shape>& memory;
  SharedMatrices<Shape> matrices;
  int warpgroup;
  int lane;
  int first_row;  // of the warp's 16
  RowKeys row_keys;
  RowScores<1> scores;
  RowSoftmax<1, kHeadSize> softmax;
  float logits[1][kKeys / 8][4];
  RowFragment weights[kKeys / 16];

  __device__ void begin() {
    const int count = min(block.num_rows - first_row, kRows);
    row_keys = count > 0 ? RowKeys::of(params, block, first_row, count) : RowKeys{};
    scores = RowScores<1>::of(params, block.kv_head);
    softmax.reset();
  }

  // All tiles. The weights of the last one are still to be multiplied when the loop ends.
  __device__ void run() {
    if (tiles.count == 0) return;
#pragma unroll 1
    for (int tile = 0; tile < tiles.count; ++tile) attend(tile);
    memory.values.wait_until_full(tiles.count - 1);
    begin_products();
    multiply_values_of(tiles.count - 1);
    commit_products();
    wait_for_products<0>();
    pin(softmax.out[0]);
  }

  // Takes in the keys of a tile and the values of the one before.
  __device__ void attend(int tile) {
    memory.keys.wait_until_full(tile);
    sync_threads(kFirstTurn + warpgroup, 2 * kWarpgroupSize);
    pin(logits[0]);
    begin_products();
    multiply_keys_of(tile);
    commit_products();
    if (tile > 0) {
      memory.values.wait_until_full(tile - 1);
      begin_products();
      multiply_values_of(tile - 1);
      commit_products();
      arrive_threads(kFirstTurn + 1 - warpgroup, 2 * kWarpgroupSize);
      wait_for_products<1>();
    } else {
      arrive_threads(kFirstTurn + 1 - warpgroup, 2 * kWarpgroupSize);
      wait_for_products<0>();
    }
    pin(logits[0]);
    memory.keys.release(tile, lane);  // by each warp, since each has waited for its own part alone
    float shrink[1][2];
    const bool raised = weigh(tile, shrink);
    wait_for_products<0>();
    pin(softmax.out[0]);
    pin(logits[0]);  // so that no weight is packed before
    if (tile > 0) memory.values.release(tile - 1, lane);
    if (raised) softmax.rescale(shrink);
    pack_weights();
  }

  // Begins logits = query * keys^T.
  __device__ void multiply_keys_of(int tile) {
    const SlabMatrix query = SlabMatrix::at(
        shared_address(matrices.query) + warpgroup * Shape::kRows * 128, Shape::kQuerySlabBytes);
    const SlabMatrix keys = SlabMatrix::at(matrices.keys(tile), Shape::kSlabBytes);
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
      const int slab = step / 4, in_slab = step % 4 * 32;
      multiply_rows_async<Number, kKeys>(logits[0],
                                         query.from(slab * Shape::kQuerySlabBytes + in_slab),
                                         keys.from(slab * Shape::kSlabBytes + in_slab), step > 0);
    }
  }

  // Begins out += weights * values.
  __device__ void multiply_values_of(int tile) {
    const SlabMatrix values = SlabMatrix::at(matrices.values(tile), Shape::kSlabBytes);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      const SlabMatrix rows = values.from(n * 16 * 128);
#pragma unroll
      for (int wide = 0; wide < kHeadSize / 128; ++wide) {
        multiply_columns_async<Number, 128>(softmax.out[0] + 16 * wide, weights[n],
                                            rows.from(2 * wide * Shape::kSlabBytes));
      }
      if constexpr (kHeadSize % 128 != 0) {
        multiply_columns_async<Number, 64>(softmax.out[0] + kHeadSize / 8 - 8, weights[n],
                                           rows.from((Shape::kSlabs - 1) * Shape::kSlabBytes));
      }
    }
  }

  // From the dot products of a tile to weights; true: what has been gathered is to be rescaled.
  __device__ bool weigh(int tile, float (&shrink)[1][2]) {
    const int32_t first_key = tiles.first_key(tile);
    const bool masked = first_key < row_keys.all.begin || first_key + kKeys > row_keys.all.end;
    scores.template apply<kKeys>(params, block, first_row, nullptr, logits, first_key, masked,
                                 lane);
    const bool raised = softmax.template raise_base<kKeys>(logits, scores.factor, shrink);
    softmax.template weigh_in_place<kKeys>(logits, scores.factor);
    return raised;
  }

  // The weights as what multiplies the values: products that read those of before have ended.
  __device__ void pack_weights() {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &logits[0][2 * n + i / 2][i % 2 * 2];
        weights[n][i] = pack(Number(), pair[0], pair[1]);
      }
    }
  }
};

// What a thread of a warpgroup that computes does.
template <typename Shape>
__device__ void consume(const AttentionParams& params, const PrefillPlan& plan,
                        const RowBlock& block, const TileRange<Shape::kKeys>& tiles,
                        WarpgroupMemory<Shape>& memory, const SharedMatrices<Shape>& matrices,
                        int warpgroup) {
  const int warp = threadIdx.x / kWarpSize % 4, lane = threadIdx.x % kWarpSize;
  const int first_row = warpgroup * Shape::kRows;
  const QueryRows<Shape::kHeadSize, Shape::kRows, kWarpgroupSize> query{
      params, plan, block, first_row, static_cast<int>(threadIdx.x) % kWarpgroupSize};
  query.load([&](int row, int byte) { return matrices.query_chunk(row, byte); });
  if (warpgroup == 1) arrive_threads(kFirstTurn, 2 * kWarpgroupSize);
  WarpgroupRows<Shape> rows{params,   block,     tiles, memory,
                            matrices, warpgroup, lane,  first_row + warp * kRows};
  rows.begin();
  wait_for_copies<0>();
  show_to_matrix_units();
  sync_threads(kFirstQuery + warpgroup, kWarpgroupSize);
  rows.run();
  write_rows<typename Shape::Cache>(params, block, rows.first_row, rows.softmax, lane);
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    prefill_warpgroups_kernel(const __grid_constant__ AttentionParams params,
                              const __grid_constant__ PrefillPlan plan) {
#if PAGED_OPS_SM90A
  wait_where_needed(plan);
  __shared__ WarpgroupMemory<Shape> memory;
  const int kv_head = static_cast<int>(blockIdx.x) % params.num_kv_heads;
  int64_t seq = 0;
  const RowBlock block = plan.blocks.at(params, blockIdx.x / params.num_kv_heads, kv_head, &seq);
  if (block.num_rows == 0) return;
  if (threadIdx.x == 0) {
    memory.keys.begin(kWarpgroupSize, Shape::kConsumers * 4);
    memory.values.begin(kWarpgroupSize, Shape::kConsumers * 4);
  }
  __syncthreads();
  const TileRange<Shape::kKeys> tiles = TileRange<Shape::kKeys>::of(params, block);
  const auto matrices = SharedMatrices<Shape>::of_cta();
  const int warpgroup = threadIdx.x / kWarpgroupSize;
  if (warpgroup == Shape::kConsumers) {
    give_registers_back<Shape::kProducerRegisters>();
    TileProducer<Shape>(params, plan, seq, kv_head, tiles, threadIdx.x % kWarpgroupSize)
        .run(memory, matrices);
  } else {
    take_registers<Shape::kConsumerRegisters>();
    consume<Shape>(params, plan, block, tiles, memory, matrices, warpgroup);
  }
#endif
}

// Head sizes that are computed as such; smaller ones are padded in shared memory, not in the cache.
using BuiltWarpgroupHeadSizes = Built<64, 128, 192, 256>;

// Calls run(WarpgroupShape).
template <typename Cache, typename Run>
void with_warpgroup_shape(const AttentionParams& params, Run&& run) {
  const BuiltWarpgroupHeadSizes sizes;
  dispatch(sizes, built_for(sizes, params.head_size), "head_size",
           [&](auto size) { run(WarpgroupShape<Cache, size()>()); });
}

template <typename Cache>
bool runs_on_warpgroups(const AttentionParams& params) {
  bool has_body = false;
  with_warpgroup_shape<Cache>(params, [&](auto shape) {
    constexpr auto kKernel = prefill_warpgroups_kernel<decltype(shape)>;
    has_body = KernelOnDevice<kKernel>::current(params.op).has_body(params.op);
  });
  return has_body;
}

template <typename Cache>
void run_prefill_on_warpgroups(const AttentionParams& params, int32_t min_query_len,
                               cudaStream_t stream) {
  with_warpgroup_shape<Cache>(params, [&](auto shape) {
    using Shape = decltype(shape);
    const PrefillPlan plan = PrefillPlan::of(params, Shape::kCtaRows, min_query_len);
    launch<prefill_warpgroups_kernel<Shape>>(params.op, {plan.num_ctas(params)}, Shape::kThreads,
                                             Shape::kSharedBytes, stream, params, plan);
  });
}

}  // namespace paged_ops::cuda
