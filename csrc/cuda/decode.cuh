// Attention of a few query rows per sequence at the speed at which keys and values can be read.
//
// A CTA of four warps takes an even share of the keys of the batch (schedule.cuh) for up to four KV
// heads: each warp owns one head, or, where there are fewer, a part of each tile's keys. The CTAs
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
#include "query_columns.cuh"
#include "row_output.cuh"
#include "schedule.cuh"

namespace paged_ops::cuda {

// What one CTA is to compute, apart from the keys.
struct CtaRows {
  int32_t first_head;
  int32_t first_row;

  __device__ static CtaRows of(const DecodePlan& plan, int column) {
    return {column / plan.row_chunks * plan.heads, column % plan.row_chunks * plan.rows_per_cta};
  }

  __device__ RowBlock block(const AttentionParams& params, const DecodePlan& plan, const Span& span,
                            int head) const {
    const int group_size = params.num_heads / params.num_kv_heads;
    const int rows = min(plan.rows_per_cta, span.query_len * group_size - first_row);
    return {span.first_token, span.query_len, span.seq_len, first_head + head, first_row, rows};
  }
};

// Fetches a warp's keys and values: 16 bytes by each lane, kRowThreads lanes to a row.
template <typename Cache, int kHeadSize>
class TileLoader {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize>;

 public:
  // `part`: which of the CTA's parts of a tile's keys is the warp's.
  __device__ TileLoader(const AttentionParams& params, int head, int part, int lane)
      : first_row_(lane / Shape::kRowThreads * kRowsOfLane),
        part_(part * Shape::kKeys),
        in_head_(column(lane) < params.head_size * static_cast<int>(sizeof(Cache))) {
    const auto first_byte = [&](const CacheHalf<const void*>& half) {
      const int64_t first = head * half.stride_head * static_cast<int64_t>(sizeof(Cache));
      return static_cast<const char*>(half.data) + first + column(lane);
    };
    key_ = first_byte(params.key_cache);
    value_ = first_byte(params.value_cache);
  }

  // Begins to fetch the tile whose tokens lie at `places`.
  template <typename Place>
  __device__ void load(const Place* places, SharedAddress keys) const {
    if (Shape::kRowThreads > Shape::kChunks && column(threadIdx.x) >= Shape::kRowBytes) return;
    places += part_ + first_row_;
    keys += first_row_ * Shape::kPitch + column(threadIdx.x);
#pragma unroll
    for (int first = 0; first < kRowsOfLane; first += kRowsAtOnce) {
      Place at[kRowsAtOnce];  // all read before the first is used
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) at[i] = places[first + i];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        load_row(keys + (first + i) * Shape::kPitch, key_, at[i].key);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        load_row(keys + Shape::kHalfBytes + (first + i) * Shape::kPitch, value_, at[i].value);
      }
    }
  }

 private:
  static constexpr int kRowsOfLane = Shape::kKeys * Shape::kRowThreads / kWarpSize;
  static constexpr int kRowsAtOnce = kRowsOfLane < 8 ? kRowsOfLane : 8;

  __device__ static int column(int lane) { return lane % Shape::kRowThreads * 16; }

  __device__ void load_row(SharedAddress to, const char* first, int64_t offset) const {
    const bool present = in_head_ && static_cast<int32_t>(offset >> 32) >= 0;  // else zeros
    copy_async_16(to, first + offset, present);
  }

  int first_row_;
  int part_;
  bool in_head_;
  const char* key_;
  const char* value_;
};

// The power of two at or below x, of 0 and of what is not a number that of 1.
__device__ inline int exponent_of(float x) {
  return x >= 0x1p-100f && x <= 0x1p+127f ? ilogbf(x) : 0;
}

// Waits until at most num_stages - 1 groups of copies are on their way.
__device__ inline void wait_for_oldest(int num_stages) {
  switch (num_stages) {
    case 2:
      return wait_for_copies<1>();
    case 3:
      return wait_for_copies<2>();
    case 4:
      return wait_for_copies<3>();
    case 5:
      return wait_for_copies<4>();
    default:
      return wait_for_copies<5>();
  }
}

// The query rows of one warp in one sequence, and what they have gathered. On the matrix units they
// are kTiles times 8 columns.
template <typename Cache, int kHeadSize, int kTiles>
struct DecodeRows {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize>;
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
    multiply_keys<Cache, kHeadSize, Shape::kKeys, kTiles>(query, keys, Shape::kPitch, lane,
                                                          weights);
    const bool masked = first_key < seen_by_all.begin || first_key + Shape::kKeys > seen_by_all.end;
    scores.template apply<Shape::kKeys>(params, block, weights, first_key, masked, lane);
    softmax.template weigh<Shape::kKeys>(weights);
  }

  __device__ void add_values(SharedAddress values, int lane) {
    multiply_values<Cache, kHeadSize, Shape::kKeys, kTiles>(weights, values, Shape::kPitch, lane,
                                                            softmax.out);
  }

  // Puts the result into shared memory, [8 * kTiles, kResultPitch] floats: the sums of a row, and
  // after them its maximum and its sum.
  __device__ void put(float* result, int lane) {
    softmax.finish();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* const row = result + (tile * kColumns + query_of(lane, i)) * Shape::kResultPitch;
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

// Writes four columns of a row, from column d on.
__device__ inline void write_row(const AttentionParams& params, const RowBlock& block, int row,
                                 int d, const float4& sums, const float2& softmax) {
  const RowOutput output = RowOutput::of(params, block, row, softmax.x, softmax.y);
  with_float_type(params.out_dtype, [&](auto type) {
    auto* const out = static_cast<decltype(type)*>(params.out);
    output.store(out, d, sums.x, sums.y);
    output.store(out, d + 2, sums.z, sums.w);
  });
  if (params.lse != nullptr && d == 0) params.lse[output.lse_index] = output.lse;
}

// Sequences that a CTA has stored a piece of and not yet told the others: to tell them waits for
// all that is on its way, so it is put off until the end.
struct CutSequences {
  static constexpr int kCapacity = 2;  // the first and the last of a share
  int count;
  CutSequence cut[kCapacity];
};

// What a CTA does at the end of a piece. Its functions are not inlined: they are rare, and need
// registers that the loop over tiles would have to do without.
struct PieceEnd {
  const AttentionParams& params;
  const DecodePlan& plan;
  const PieceStore& store;
  CutSequences& cut;
  CtaRows cta;

  // The results of the CTA's warps lie `pitch` floats apart. Warps that share a head are added up
  // in their order.
  __device__ __noinline__ void finish(const Share& share, const Tile& tile, const float* results,
                                      int pitch, int row_pitch) const {
    __syncthreads();  // all have put their results
    const Span span = span_of(params, plan, tile.seq);
    const Piece piece = Piece::of(plan, share, tile, span);
    const int num_rows = cta.block(params, plan, span, 0).num_rows;
    const int warps = blockDim.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int i = threadIdx.x / kWarpSize; i < plan.heads * num_rows; i += warps) {
      const int head = i / num_rows, row = i % num_rows;
      const float* const from = results + head * pitch + row * row_pitch;
      finish_row(cta.block(params, plan, span, head), piece, head, row, lane, from,
                 plan.heads * pitch, warps / plan.heads, row_pitch - 4);
    }
    if (piece.count == 1) return;
    if (threadIdx.x == 0) cut.cut[cut.count] = {piece, num_rows, span};
    __syncthreads();
    if (threadIdx.x == 0) ++cut.count;
    __syncthreads();
    if (cut.count == CutSequences::kCapacity) merge();
  }

  // Puts cut sequences together where this CTA is the last.
  __device__ __noinline__ void merge() const {
    const PieceMerger merger(params, plan, store);
    for (int i = 0; i < cut.count; ++i) {
      const CutSequence& sequence = cut.cut[i];
      if (!merger.is_last(sequence)) continue;
      merger.finish(
          sequence, [&](int head, int row, int d, const float4& sums, const float2& softmax) {
            write_row(params, cta.block(params, plan, sequence.span, head), row, d, sums, softmax);
          });
    }
    __syncthreads();
    if (threadIdx.x == 0) cut.count = 0;
  }

 private:
  __device__ void finish_row(const RowBlock& block, const Piece& piece, int head, int row, int lane,
                             const float* from, int pitch, int parts, int softmax_column) const {
    float maximum = -INFINITY;
    for (int part = 0; part < parts; ++part) {
      maximum = fmaxf(maximum, from[part * pitch + softmax_column]);
    }
    for (int d = lane * 4; d < params.head_size; d += kWarpSize * 4) {
      float4 sums{};
      float sum = 0.0f;
      for (int part = 0; part < parts; ++part) {
        const float* const of_part = from + part * pitch;
        const float weight = exp2_approx(of_part[softmax_column] - base_of(maximum));
        const float4 values = *reinterpret_cast<const float4*>(of_part + d);
        sums.x += weight * values.x, sums.y += weight * values.y;
        sums.z += weight * values.z, sums.w += weight * values.w;
        sum += weight * of_part[softmax_column + 1];
      }
      if (piece.count == 1) {
        write_row(params, block, row, d, sums, {maximum, sum});
        continue;
      }
      const int64_t index =
          PieceMerger(params, plan, store).rows_of(piece.slot(piece.index), head) + row;
      *reinterpret_cast<float4*>(store.sums + index * params.head_size + d) = sums;
      if (d == 0) store.softmaxes[index] = {maximum, sum};
    }
  }
};

template <typename Cache, int kHeadSize>
struct DecodeMemory {
  using Tiles = Agenda<Cache, DecodeShape<sizeof(Cache), kHeadSize>::kThreads>;
  typename Tiles::Memory tiles;
  RowBlock blocks[DecodeShape<sizeof(Cache), kHeadSize>::kWarps];
  Share share;
  CutSequences cut;
};

template <typename Cache, int kHeadSize, int kTiles>
__global__ void __launch_bounds__(DecodeShape<sizeof(Cache), kHeadSize>::kThreads,
                                  DecodeShape<sizeof(Cache), kHeadSize>::kCtasPerMultiprocessor)
    decode_kernel(const __grid_constant__ AttentionParams params,
                  const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ PieceStore store) {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize>;
  using Tiles = typename DecodeMemory<Cache, kHeadSize>::Tiles;
  __shared__ DecodeMemory<Cache, kHeadSize> shared;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head = warp & (plan.heads - 1), part = warp >> plan.heads_log2;
  const CtaRows cta = CtaRows::of(plan, static_cast<int>(blockIdx.x) % plan.num_columns);

  zero_rows_without_sequence(params);
  const Share share = find_share<Shape::kThreads>(params, plan, blockIdx.x / plan.num_columns);
  if (share.begin == share.end) return;
  if (threadIdx.x == 0) {
    shared.share = share;
    shared.cut.count = 0;
  }

  unsigned char* const memory = dynamic_shared_memory();
  const SharedAddress rows_of_warp = shared_address(memory) + warp * Shape::kWarpBytes;
  Tiles tiles(params, plan, share, shared.tiles);
  const TileLoader<Cache, kHeadSize> loader(params, cta.first_head + head, part, lane);
  DecodeRows<Cache, kHeadSize, kTiles> rows;
  RowBlock& block = shared.blocks[warp];
  const PieceEnd piece_end{params, plan, store, shared.cut, cta};
  bool begins_piece = true;
  // Tile `next` is fetched into the stage of the tile before `index`.
  int stage = plan.stages - 1, next_stage = plan.stages - 2;
#pragma unroll 1
  for (int next = -1, index = -plan.stages;; ++index, ++next) {
    next_stage = stage;
    stage = stage + 1 == plan.stages ? 0 : stage + 1;
    tiles.prepare(next);
    if (index >= tiles.num_tiles()) break;
    __syncthreads();  // keeps the warps in step: what is neighbouring in memory is read together
    if (0 <= next && next < tiles.num_tiles()) {
      loader.load(shared.tiles.places + tiles.entry(next),
                  rows_of_warp + next_stage * Shape::kStageBytes);
    }
    commit_copies();
    if (index < 0) continue;
    const Tile& tile = tiles.tile(index);
    if (begins_piece) {
      if (lane == 0) block = cta.block(params, plan, span_of(params, plan, tile.seq), head);
      __syncwarp();
      rows.begin(params, block, lane);
    }
    wait_for_oldest(plan.stages);
    __syncwarp();
    const SharedAddress keys = rows_of_warp + stage * Shape::kStageBytes;
    rows.weigh(params, block, keys, tile.first_key + part * Shape::kKeys, lane);
    rows.add_values(keys + Shape::kHalfBytes, lane);
    begins_piece = tile.ends_piece;
    if (begins_piece) {
      __syncwarp();
      unsigned char* const results = memory + stage * Shape::kStageBytes;
      rows.put(reinterpret_cast<float*>(results + warp * Shape::kWarpBytes), lane);
      piece_end.finish(shared.share, tile, reinterpret_cast<const float*>(results),
                       Shape::kWarpBytes / 4, Shape::kResultPitch);
      rows = {};  // so that no register has to be kept during the call
    }
  }
  __syncthreads();
  if (shared.cut.count > 0) piece_end.merge();
}

// The kernel for up to 8 * kTiles query rows of a KV head.
template <typename Cache, int kHeadSize>
struct Decode {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize>;

  static DecodePlan plan(const AttentionParams& params, const DeviceLimits& limits) {
    constexpr int kStaticBytes = sizeof(DecodeMemory<Cache, kHeadSize>) + 128;
    return plan_decode<Shape>(params, limits, kStaticBytes);
  }

  static void launch(const AttentionParams& params, const DecodePlan& plan, const PieceStore& store,
                     cudaStream_t stream) {
    if constexpr (Shape::kMaxTiles == 2) {
      if (plan.tiles == 2) return launch_for<2>(params, plan, store, stream);
    }
    launch_for<1>(params, plan, store, stream);
  }

 private:
  template <int kTiles>
  static void launch_for(const AttentionParams& params, const DecodePlan& plan,
                         const PieceStore& store, cudaStream_t stream) {
    const Grid grid{static_cast<int64_t>(plan.num_shares) * plan.num_columns};
    cuda::launch(params.op, decode_kernel<Cache, kHeadSize, kTiles>, grid, Shape::kThreads,
                 plan.stages * Shape::kStageBytes, stream, params, plan, store);
  }
};

}  // namespace paged_ops::cuda
