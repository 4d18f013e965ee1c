// Attention of a few query rows per sequence at the speed at which keys and values can be read.
//
// A CTA takes an even share of the keys of the batch (schedule.cuh) for a group of KV heads, at
// most as many as it has warps: a warp owns one head in a part of each tile's keys. The CTAs
// of one share, one for each group of heads, run side by side, so that rows of the cache which are
// neighbours in memory are read at about the same time.
//
// Tiles are fetched some tiles ahead into a ring of stages; each warp fetches what it uses itself.
//
// A sequence that ends inside of the share is written out, one that is cut becomes a piece, and the
// last CTA that has a piece of it puts it together. One launch, no plan and no length on the host.
//
// The code is kept short, and what is rare out of the loop: at each launch the instructions come
// from memory too, and local memory has no room in an L1 cache that is nearly all shared memory.
#pragma once

#include <cstdint>

#include "agenda.cuh"
#include "column_scores.cuh"
#include "heuristics.h"
#include "launch.h"
#include "pieces.cuh"
#include "ptx.cuh"
#include "query_columns.cuh"
#include "row_output.cuh"
#include "schedule.cuh"

namespace paged_ops::cuda {

// Fetches a warp's keys and values: 16 bytes by each lane, kRowThreads lanes to a row.
template <typename Cache, int kHeadSize>
class TileLoader {
  using Shape = DecodeTile<sizeof(Cache), kHeadSize>;
  using Places = Swizzle<Shape::kChunks>;

 public:
  // `part`: which of the CTA's parts of a tile's keys is the warp's.
  __device__ TileLoader(const AttentionParams& params, int head, int part, int lane)
      : first_row_(lane / Shape::kRowThreads * kRowsOfLane),
        part_(part * Shape::kKeys),
        in_row_(chunk(lane) < Shape::kChunks),
        in_head_(chunk(lane) * 16 < params.head_size * static_cast<int>(sizeof(Cache))) {
    const auto first_byte = [&](const CacheHalf<const void*>& half) {
      const int64_t first = head * half.stride_head * static_cast<int64_t>(sizeof(Cache));
      return static_cast<const char*>(half.data) + first + chunk(lane) * 16;
    };
    key_ = first_byte(params.key_cache);
    value_ = first_byte(params.value_cache);
  }

  // Begins to fetch the tile whose tokens lie at `places`.
  template <typename Place>
  __device__ void load(const Place* places, SharedAddress keys) const {
    if (!in_row_) return;
    places += part_ + first_row_;
    keys += first_row_ * Shape::kRowBytes + (chunk(threadIdx.x) ^ Places::of(first_row_)) * 16;
#pragma unroll
    for (int first = 0; first < kRowsOfLane; first += kRowsAtOnce) {
      Place at[kRowsAtOnce];  // all read before the first is used
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) at[i] = places[first + i];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) load_row(row(keys, first + i), key_, at[i].key);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        load_row(row(keys, first + i) + Shape::kHalfBytes, value_, at[i].value);
      }
    }
  }

 private:
  static constexpr int kRowsOfLane = Shape::kKeys * Shape::kRowThreads / kWarpSize;
  static constexpr int kRowsAtOnce = kRowsOfLane < 8 ? kRowsOfLane : 8;

  __device__ static int chunk(int lane) { return lane % Shape::kRowThreads; }

  // Where the chunk goes that in the lane's first row goes to `first`.
  __device__ static SharedAddress row(SharedAddress first, int i) {
    return (first ^ static_cast<SharedAddress>(Places::of(i) * 16)) + i * Shape::kRowBytes;
  }

  __device__ void load_row(SharedAddress to, const char* first, int64_t offset) const {
    const bool present = in_head_ && static_cast<int32_t>(offset >> 32) >= 0;  // else zeros
    copy_async_16(to, first + offset, present, policy_);
  }

  int first_row_;
  int part_;
  bool in_row_;
  bool in_head_;                        // else zeros
  CachePolicy policy_ = evict_first();  // pieces stay where they can be read soon
  const char* key_;
  const char* value_;
};

// Waits until at most so many groups of copies are on their way: 5 at most.
__device__ inline void wait_for_copies_but(int pending) {
  switch (pending) {
    case 1:
      return wait_for_copies<1>();
    case 2:
      return wait_for_copies<2>();
    case 3:
      return wait_for_copies<3>();
    case 4:
      return wait_for_copies<4>();
    default:
      return wait_for_copies<5>();
  }
}

// The query rows of one warp in one sequence, and what they have gathered. On the matrix units they
// are kTiles times 8 columns.
template <typename Cache, int kHeadSize, int kTiles>
struct DecodeRows {
  using Shape = DecodeTile<sizeof(Cache), kHeadSize>;
  static constexpr int kSteps = kHeadSize / 16;

  KeyRange seen_by_all;  // keys that no row has masked
  QueryFragment query[kTiles][kSteps];
  ColumnScores<kTiles> scores;
  ColumnSoftmax<kTiles, kHeadSize> softmax;
  float weights[kTiles][Shape::kKeys / 16][4];

  __device__ void begin(const AttentionParams& params, const RowBlock& block, int lane) {
    load_query(params, block, lane);
    scores.prepare(params, block);
    if constexpr (kIsFloat8<Cache>) narrow_query(params.query_dtype, lane);
    softmax.reset();
    const int last = max(block.num_rows - 1, 0);
    const KeyRange first_sees =
        visible_keys(params, block.seq_len, place_of(params, block, 0).position);
    const KeyRange last_sees =
        visible_keys(params, block.seq_len, place_of(params, block, last).position);
    seen_by_all = {last_sees.begin, first_sees.end};
  }

  __device__ void load_query(const AttentionParams& params, const RowBlock& block, int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = tile * kColumns + lane / 4;
      const bool present = row < block.num_rows;
      const RowPlace place = place_of(params, block, present ? row : 0);
      const auto* const from = static_cast<const uint16_t*>(params.query) +
                               place.token * params.query_stride_token +
                               place.head * params.query_stride_head;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          // Head sizes are multiples of 8, those of float8 of 16.
          const bool inside = step * 16 + (kIsFloat8<Cache> ? 0 : part * 8) < params.head_size;
          query[tile][step][part] =
              present && inside
                  ? *reinterpret_cast<const uint32_t*>(from + Columns<Cache>::of(step, part, lane))
                  : 0u;
        }
      }
    }
  }

  // The query as float16: each row multiplied by the power of two that brings its largest element
  // near 2^8, so that neither large nor small queries leave float16's range.
  __device__ void narrow_query(DType dtype, int lane) {
    with_matrix_type(dtype, [&](auto type) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float largest = 0.0f;
        for_each_word(tile, [&](uint32_t& word) {
          const float2 pair = unpack(type, word);
          largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
        });
        const int exponent = exponent_of(quad_max(largest));
        const float up = exp2f(static_cast<float>(8 - exponent));
        const float down = exp2f(static_cast<float>(exponent - 8));
        for_each_word(tile, [&](uint32_t& word) {
          const float2 pair = unpack(type, word);
          word = pack(__half(), pair.x * up, pair.y * up);
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores.scale[tile][i] *= warp_broadcast(down, query_of(lane, i) * 4);
        }
      }
    });
  }

  template <typename Run>
  __device__ void for_each_word(int tile, Run&& run) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) run(query[tile][step][part]);
    }
  }

  // The weights of a tile's keys, of which the warp's first is `first_key`.
  __device__ void weigh(const AttentionParams& params, const RowBlock& block, SharedAddress keys,
                        int32_t first_key, int lane) {
    multiply_keys<Cache, kHeadSize, Shape::kKeys, kTiles>(query, keys, lane, weights);
    const bool masked = first_key < seen_by_all.begin || first_key + Shape::kKeys > seen_by_all.end;
    scores.template apply<Shape::kKeys>(params, block, weights, first_key, masked, lane);
    softmax.template weigh<Shape::kKeys>(weights);
  }

  __device__ void add_values(SharedAddress values, int lane) {
    multiply_values<Cache, kHeadSize, Shape::kKeys, kTiles>(weights, values, lane, softmax.out);
  }

  // Puts the results into shared memory, [num_rows, kResultPitch] floats: the sums of a row, and
  // after them their maximum and the sum of the weights.
  __device__ void put(float* results, int num_rows, int lane) {
    softmax.finish();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (tile * kColumns + query_of(lane, i) >= num_rows) continue;
        float* const row = results + (tile * kColumns + query_of(lane, i)) * Shape::kResultPitch;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            row[value_column<Cache>(step, half, lane)] = softmax.out[tile][step][2 * half + i];
          }
        }
        if (lane < 4) store_pair(row + kHeadSize, softmax.maximum[tile][i], softmax.sum[tile][i]);
      }
    }
  }
};

template <typename Cache, int kWarps>
struct DecodeMemory {
  using Tiles = Agenda<Cache, kWarps * kWarpSize>;
  typename Tiles::Memory tiles;
  RowBlock blocks[kWarps];
  Share share;
  OpenPiece piece;
};

template <typename Cache, int kHeadSize, int kTiles, int kWarps>
__global__ void __launch_bounds__(
    kWarps* kWarpSize, DecodeShape<sizeof(Cache), kHeadSize, kWarps>::kCtasPerMultiprocessor)
    decode_kernel(const __grid_constant__ AttentionParams params,
                  const __grid_constant__ DecodePlan given,
                  const __grid_constant__ PieceStore store) {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize, kWarps>;
  using Memory = DecodeMemory<Cache, kWarps>;
  wait_for_previous_kernel();
  if (given.prefill_follows) let_next_kernel_start();
  __shared__ Memory shared;
  if (params.query_start_loc != nullptr) zero_rows_without_sequence(params);
  const Work work = find_work<Shape::kThreads>(params, given);
  const DecodePlan& plan = work.plan;
  const Share& share = work.share;
  if (share.begin == share.end) return;
  if (threadIdx.x == 0) shared.share = share;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head = warp & (plan.heads() - 1), part = warp >> plan.heads_log2;
  const CtaRows cta = CtaRows::of(plan, work.column);
  unsigned char* const memory = dynamic_shared_memory();
  const SharedAddress rows_of_warp = shared_address(memory) + warp * Shape::kWarpBytes;
  typename Memory::Tiles tiles(params, plan, share, shared.tiles);
  const TileLoader<Cache, kHeadSize> loader(params, cta.first_head + head, part, lane);
  DecodeRows<Cache, kHeadSize, kTiles> rows;
  RowBlock& block = shared.blocks[warp];
  const PieceEnd piece_end{params, plan, store, shared.piece, cta};
  bool begins_piece = true;
  // Matrix loads wait in a queue behind the copies that are asked for before them: one half of the
  // warps fetches while the other computes. With two stages nothing would be on its way then.
  const bool fetches_first = warp < kWarps / 2 || plan.stages == 2;
  // Tile `next` is fetched into the stage of the tile before `index`.
  int stage = plan.stages - 1;
#pragma unroll 1
  for (int next = -1, index = -plan.stages;; ++index, ++next) {
    const int next_stage = stage;
    stage = stage + 1 == plan.stages ? 0 : stage + 1;
    tiles.place(next);
    if (index >= tiles.num_tiles()) break;
    __syncthreads();  // keeps the warps in step: what is neighbouring in memory is read together
    const auto fetch = [&] {
      if (0 <= next && next < tiles.num_tiles()) {
        loader.load(shared.tiles.places + tiles.entry(next),
                    rows_of_warp + next_stage * Shape::kStageBytes);
      }
      commit_copies();
      tiles.look_up(next);
    };
    if (fetches_first || index < 0) fetch();
    if (index < 0) continue;
    const Tile& tile = tiles.tile(index);
    if (begins_piece) {
      if (lane == 0) block = cta.block(plan, tile.span, head);
      if (threadIdx.x == 0) piece_end.begin(shared.share, tile);
      __syncwarp();
      rows.begin(params, block, lane);
    }
    wait_for_copies_but(fetches_first ? plan.stages - 1 : plan.stages - 2);
    __syncwarp();
    const SharedAddress keys = rows_of_warp + stage * Shape::kStageBytes;
    rows.weigh(params, block, keys, tile.first_key + part * Shape::kKeys, lane);
    rows.add_values(keys + Shape::kHalfBytes, lane);
    begins_piece = tile.ends_piece;
    if (!fetches_first) fetch();
    if (begins_piece) {
      __syncthreads();  // all have read their keys and values
      auto* const results = reinterpret_cast<float*>(memory + stage * Shape::kStageBytes);
      rows.put(results + warp * block.num_rows * Shape::kResultPitch, block.num_rows, lane);
      // Until the share ends, keys and values are on their way into all other stages.
      const bool ends_share = index + 1 == tiles.num_tiles();
      piece_end.finish(
          tile, results,
          ends_share ? MergeRoom{reinterpret_cast<float*>(memory), plan.stages * plan.result_rows}
                     : MergeRoom{results, plan.result_rows});
      rows = {};  // so that no register has to be kept till here
    }
  }
}

// The kernels for one cache type and head size.
template <typename Cache, int kHeadSize>
struct Decode {
  static constexpr int kLarge = kWarpsOfLarge<sizeof(Cache), kHeadSize>;
  static constexpr int kMaxTiles = DecodeTile<sizeof(Cache), kHeadSize>::kMaxTiles;

  static DecodePlan plan(const AttentionParams& params, const DeviceLimits& limits) {
    const DecodePlan plan = plan_for<kLarge>(params, limits);
    return plan.stages >= 2 ? plan : plan_for<kWarpsOfSmall>(params, limits);
  }

  static void launch(const AttentionParams& params, const DecodePlan& plan, const PieceStore& store,
                     cudaStream_t stream) {
    const bool large = plan.warps == kLarge;
    if constexpr (kMaxTiles == 2) {
      if (plan.tiles == 2)
        return (large ? run<2, kLarge> : run<2, kWarpsOfSmall>)(params, plan, store, stream);
    }
    (large ? run<1, kLarge> : run<1, kWarpsOfSmall>)(params, plan, store, stream);
  }

 private:
  template <int kWarps>
  static DecodePlan plan_for(const AttentionParams& params, const DeviceLimits& limits) {
    constexpr int kStaticBytes = sizeof(DecodeMemory<Cache, kWarps>) + 128;
    return plan_decode<DecodeShape<sizeof(Cache), kHeadSize, kWarps>>(params, limits, kStaticBytes);
  }

  template <int kTiles, int kWarps>
  static void run(const AttentionParams& params, const DecodePlan& plan, const PieceStore& store,
                  cudaStream_t stream) {
    using Shape = DecodeShape<sizeof(Cache), kHeadSize, kWarps>;
    cuda::launch<decode_kernel<Cache, kHeadSize, kTiles, kWarps>>(
        params.op, grid_of(plan), Shape::kThreads, plan.stages * Shape::kStageBytes, stream, params,
        plan, store);
  }
};

}  // namespace paged_ops::cuda
