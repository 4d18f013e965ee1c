// The prefill kernel for compute capability 9.0, whose matrix units want whole warpgroups and
// operands in shared memory: FlashAttention-3 (Shah et al., 2024) over a paged cache.
//
// A CTA takes 128 of the rows of one KV head at a time: all query heads of the group share its keys
// and values. Two warpgroups compute 64 rows each. A third one, with hardly any registers, fetches
// keys and values into a ring of tiles: blocks of a few tokens are too small for the tensor copy
// engine, so it looks up the block table and copies 16 bytes at a time. There is one CTA to a
// multiprocessor, which draws one block of rows after the other: when the last tiles of one are
// computed with, the first of the next are on their way.
//
// A warpgroup begins to multiply a tile's keys, and the weights of the tile before with the values,
// and computes exponentials of the former while the latter goes on. The two take turns in beginning
// products, so that one computes exponentials while the other multiplies.
//
// A block of rows depends on its sequence alone, and all its keys are added up by one CTA in their
// order: the result depends neither on the rest of the batch nor on timing.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../dispatch.h"
#include "fragments.cuh"
#include "heuristics.h"
#include "launch.h"
#include "prefill.h"
#include "prefill_plan.h"
#include "ptx_sm90a.cuh"
#include "row_output.cuh"
#include "row_scores.cuh"
#include "row_softmax.cuh"
#include "tile_producer.cuh"
#include "warpgroup_memory.cuh"

namespace paged_ops::cuda {

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
  int first_tile;  // in the rings
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

  // All tiles, but for the values of the last one.
  __device__ void run() {
#pragma unroll 1
    for (int tile = 0; tile < tiles.count; ++tile) attend(tile);
  }

  __device__ void add_last_values() {
    if (tiles.count == 0) return;
    const int last = first_tile + tiles.count - 1;
    wait_for_tile(memory.values, last);
    begin_products();
    multiply_values_of(last);
    commit_products();
    wait_for_products<0>();
    pin(softmax.out[0]);
    memory.values.release(last, lane);
  }

  template <typename Tiles>
  __device__ static void wait_for_tile(Tiles& ring, int in_ring) {
    ring.wait_until_full(in_ring);
    show_to_matrix_units();
  }

  // Takes in the keys of a tile and the values of the one before.
  __device__ void attend(int tile) {
    const int in_ring = first_tile + tile;
    wait_for_tile(memory.keys, in_ring);
    sync_threads(kFirstTurn + warpgroup, 2 * kWarpgroupSize);
    pin(logits[0]);
    begin_products();
    multiply_keys_of(in_ring);
    commit_products();
    if (tile > 0) {
      wait_for_tile(memory.values, in_ring - 1);
      begin_products();
      multiply_values_of(in_ring - 1);
      commit_products();
      arrive_threads(kFirstTurn + 1 - warpgroup, 2 * kWarpgroupSize);
      wait_for_products<1>();
    } else {
      arrive_threads(kFirstTurn + 1 - warpgroup, 2 * kWarpgroupSize);
      wait_for_products<0>();
    }
    pin(logits[0]);
    memory.keys.release(in_ring, lane);  // by each warp: each has waited for its own part alone
    float shrink[1][2];
    const bool raised = weigh(tile, shrink);
    wait_for_products<0>();
    pin(softmax.out[0]);
    pin(logits[0]);  // so that no weight is packed before
    if (tile > 0) memory.values.release(in_ring - 1, lane);
    if (raised) softmax.rescale(shrink);
    pack_weights();
  }

  // Begins logits = query * keys^T.
  __device__ void multiply_keys_of(int in_ring) {
    const SlabMatrix query = SlabMatrix::at(
        shared_address(matrices.query) + warpgroup * Shape::kRows * 128, Shape::kQuerySlabBytes);
    const SlabMatrix keys = SlabMatrix::at(matrices.keys(in_ring), Shape::kSlabBytes);
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
      const int slab = step / 4, in_slab = step % 4 * 32;
      multiply_rows_async<Number, kKeys>(logits[0],
                                         query.from(slab * Shape::kQuerySlabBytes + in_slab),
                                         keys.from(slab * Shape::kSlabBytes + in_slab), step > 0);
    }
  }

  // Begins out += weights * values.
  __device__ void multiply_values_of(int in_ring) {
    const SlabMatrix values = SlabMatrix::at(matrices.values(in_ring), Shape::kSlabBytes);
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
                        WarpgroupMemory<Shape>& memory, const SharedMatrices<Shape>& matrices,
                        int warpgroup) {
  const int warp = threadIdx.x / kWarpSize % 4, lane = threadIdx.x % kWarpSize;
  const int first_row = warpgroup * Shape::kRows + warp * kRows;
  if (warpgroup == 1) arrive_threads(kFirstTurn, 2 * kWarpgroupSize);
  int first_tile = 0;
#pragma unroll 1
  for (int index = 0;; ++index) {
    memory.jobs.wait_until_full(index);
    const RowBlock& block = memory.job(index).block;
    if (block.num_rows == 0) break;
    const TileRange<Shape::kKeys> tiles = TileRange<Shape::kKeys>::of(params, block);
    WarpgroupRows<Shape> rows{params,     block,     tiles, memory,   matrices,
                              first_tile, warpgroup, lane,  first_row};
    rows.begin();
    memory.queries.wait_until_full(index);
    show_to_matrix_units();
    rows.run();
    __syncwarp();  // without a tile, nothing has brought its lanes together since they waited
    memory.queries.release(index, lane);
    rows.add_last_values();
    write_rows<typename Shape::Cache>(params, plan.wide_out, block, first_row, rows.softmax, lane);
    __syncwarp();  // all lanes have read the block
    memory.jobs.release(index, lane);
    first_tile += tiles.count;
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    prefill_warpgroups_kernel(const __grid_constant__ AttentionParams params,
                              const __grid_constant__ PrefillPlan plan,
                              const __grid_constant__ PlaceQueue queue) {
#if PAGED_OPS_SM90A
  wait_where_needed(plan);
  __shared__ WarpgroupMemory<Shape> memory;
  if (threadIdx.x == 0) memory.begin();
  __syncthreads();
  const auto matrices = SharedMatrices<Shape>::of_cta();
  const int warpgroup = threadIdx.x / kWarpgroupSize;
  if (warpgroup == Shape::kConsumers) {
    give_registers_back<Shape::kProducerRegisters>();
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupSize;
    TileProducer<Shape>(params, plan, queue, memory, matrices, thread).run();
  } else {
    take_registers<Shape::kConsumerRegisters>();
    consume<Shape>(params, plan, memory, matrices, warpgroup);
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
                               const DeviceLimits& limits, unsigned* counter, cudaStream_t stream) {
  with_warpgroup_shape<Cache>(params, [&](auto shape) {
    using Shape = decltype(shape);
    const PrefillPlan plan = PrefillPlan::of(params, Shape::kCtaRows, min_query_len);
    const int64_t num_places = plan.num_places(params);
    const PlaceQueue queue{counter, static_cast<unsigned>(num_places)};
    const int64_t num_ctas = std::min<int64_t>(num_places, limits.multiprocessors);
    launch<prefill_warpgroups_kernel<Shape>>(params.op, {num_ctas}, Shape::kThreads,
                                             Shape::kSharedBytes, stream, params, plan, queue);
  });
}

}  // namespace paged_ops::cuda
