// Attention of a few query rows per sequence at the speed at which keys and values can be read.
//
// A CTA of four warps takes an even share of the keys of the batch (schedule.cuh) for up to four KV
// heads: each warp owns one head, or, where there are fewer, a part of each tile's keys. The CTAs
// of one share, one for each group of heads, run side by side, so that rows of the cache which are
// neighbours in memory are read at about the same time.
//
// Every warp has a pipeline of its own: the keys of a tile are fetched some tiles ahead into the
// place of keys that have been used, and likewise the values.
//
// A sequence that ends inside of the share is written out, one that is cut becomes a piece, and the
// last CTA that has a piece of it puts it together. One launch, no plan and no length on the host.
#pragma once

#include <cstdint>

#include "fragments.cuh"
#include "heuristics.h"
#include "launch.h"
#include "pieces.cuh"
#include "row_output.cuh"
#include "row_scores.cuh"
#include "row_softmax.cuh"
#include "schedule.cuh"

namespace paged_ops::cuda {

// Where the tokens of one warp's next tiles lie: two batches of 32 tokens.
struct TokenOffsets {
  int64_t key[2 * kWarpSize];  // bytes from the first token of the warp's head; negative: no token
  int64_t value[2 * kWarpSize];
};

// Brings the tiles of one warp into its stages, ahead of the computation.
template <typename Cache, int kHeadSize, int kTiles>
class TileLoader {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize, kTiles>;

 public:
  // `part`: which of the CTA's shares of a tile's keys is the warp's. `rows`: its first stage.
  __device__ TileLoader(const AttentionParams& params, const DecodePlan& plan, const Share& share,
                        int head, int part, SharedAddress rows, TokenOffsets& offsets)
      : params_(params),
        plan_(plan),
        walk_(params, plan, share),
        offsets_(offsets),
        rows_(rows),
        first_key_in_tile_(part * Shape::kKeys),
        lane_(threadIdx.x % kWarpSize) {
    const auto first_byte = [&](const CacheHalf<const void*>& half) {
      return static_cast<const char*>(half.data) + head * half.stride_head * sizeof(Cache);
    };
    key_ = first_byte(params.key_cache);
    value_ = first_byte(params.value_cache);
    look_up();
    place();
    look_up();
  }

  // Begins to fetch the keys and values of the share's tile `index` into their stage.
  __device__ void load_keys(int index, int stage) {
    if (index < num_tiles_) {
      load(key_, offsets_.key + entry_of(index), rows_ + stage * Shape::kStageBytes);
    }
    commit_copies();
    if (index % kTilesPerBatch != 0) return;
    place();
    look_up();
  }
  __device__ void load_values(int index, int stage) const {
    if (index < num_tiles_) {
      load(value_, offsets_.value + entry_of(index),
           rows_ + stage * Shape::kStageBytes + Shape::kHalfBytes);
    }
    commit_copies();
  }

 private:
  static constexpr int kTilesPerBatch = kWarpSize / Shape::kKeys;
  static constexpr int kRowsAtOnce = kWarpSize / Shape::kRowThreads;

  __device__ static int entry_of(int index) { return index % (2 * kTilesPerBatch) * Shape::kKeys; }

  // Asks for the block of a token in the next batch; `place` waits for the answer.
  __device__ void look_up() {
    key_index_ = -1;
#pragma unroll
    for (int i = 0; i < kTilesPerBatch; ++i) {
      if (walk_.done()) return;
      const Span& span = walk_.span();
      const int32_t key = walk_.first_key(plan_) + first_key_in_tile_ + lane_ % Shape::kKeys;
      if (lane_ / Shape::kKeys == i && key >= span.begin && key < span.seq_len) {
        key_index_ = key;
        const int64_t row = walk_.seq() * params_.block_table_stride;
        block_ = params_.block_table[row + block_of(key)];
      }
      ++num_tiles_;
      walk_.advance(params_, plan_);
    }
  }

  // Divisions are slow, and block sizes mostly powers of two.
  __device__ int32_t block_of(int32_t key) const {
    return plan_.block_size_log2 >= 0 ? key >> plan_.block_size_log2 : key / params_.block_size;
  }

  __device__ void place() {
    const bool present = key_index_ >= 0;
    const int64_t slot = key_index_ - block_of(key_index_) * params_.block_size;
    const auto offset = [&](const CacheHalf<const void*>& half) {
      return (block_ * half.stride_block + slot * half.stride_slot) *
             static_cast<int64_t>(sizeof(Cache));
    };
    __syncwarp();  // the batch before last is no longer read
    offsets_.key[batch_ * kWarpSize + lane_] = present ? offset(params_.key_cache) : -1;
    offsets_.value[batch_ * kWarpSize + lane_] = present ? offset(params_.value_cache) : -1;
    batch_ ^= 1;
    __syncwarp();
  }

  __device__ void load(const char* first, const int64_t* offsets, SharedAddress to) const {
    const int column = lane_ % Shape::kRowThreads * 16;
    if (column >= Shape::kRowBytes) return;
    const bool in_head = column < params_.head_size * static_cast<int>(sizeof(Cache));
#pragma unroll
    for (int i = 0; i < Shape::kKeys / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane_ / Shape::kRowThreads;
      const int64_t offset = offsets[row];
      const bool present = in_head && offset >= 0;  // else zeros
      copy_async_16(to + row * Shape::kPitch + column, first + (present ? offset + column : 0),
                    present);
    }
  }

  const AttentionParams& params_;
  const DecodePlan& plan_;
  Walk walk_;
  TokenOffsets& offsets_;
  SharedAddress rows_;
  int first_key_in_tile_;
  int lane_;
  const char* key_;
  const char* value_;
  int num_tiles_ = 0;  // that have been looked up
  int batch_ = 0;
  int32_t key_index_ = -1;
  int64_t block_ = 0;
};

// The power of two at or below x, of 0 and of what is not a number that of 1.
__device__ inline int exponent_of(float x) {
  return x >= 0x1p-100f && x <= 0x1p+127f ? ilogbf(x) : 0;
}

// Waits until at most 2 * num_stages - kFewer groups of copies are on their way.
template <int kFewer>
__device__ void wait_for_oldest(int num_stages) {
  switch (num_stages) {
    case 2:
      return wait_for_copies<4 - kFewer>();
    case 3:
      return wait_for_copies<6 - kFewer>();
    case 4:
      return wait_for_copies<8 - kFewer>();
    case 5:
      return wait_for_copies<10 - kFewer>();
    default:
      return wait_for_copies<12 - kFewer>();
  }
}

// The rows of one warp in one sequence: their queries, and what they have gathered.
template <typename Cache, int kHeadSize, int kTiles>
struct DecodeRows {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize, kTiles>;

  RowBlock block;
  KeyRange seen_by_all;  // keys that no row has masked
  RowFragment query[kTiles][kHeadSize / 16];
  RowScores<kTiles> scores;
  RowSoftmax<kTiles, kHeadSize> softmax;
  float weights[kTiles][Shape::kKeys / 8][4];

  __device__ void begin(const AttentionParams& params, const RowBlock& rows, int lane) {
    block = rows;
    scores.prepare(params, block, lane);
    load_query(params, lane);
    softmax.reset();
    const int last = max(block.num_rows - 1, 0);
    const KeyRange first_sees =
        visible_keys(params, block.seq_len, place_of(params, block, 0).position);
    const KeyRange last_sees =
        visible_keys(params, block.seq_len, place_of(params, block, last).position);
    seen_by_all = {last_sees.begin, first_sees.end};
  }

  __device__ void load_query(const AttentionParams& params, int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kRows + half * 8 + lane / 4;
        const bool present = row < block.num_rows;
        const RowPlace place = place_of(params, block, present ? row : 0);
        const int64_t offset =
            place.token * params.query_stride_token + place.head * params.query_stride_head;
        if constexpr (kIsFloat8<Cache>) {
          with_matrix_type(params.query_dtype, [&](auto type) {
            load_scaled(static_cast<const decltype(type)*>(params.query) + offset, params.head_size,
                        present, tile, half, lane);
          });
        } else {
          const Cache* const from = static_cast<const Cache*>(params.query) + offset;
#pragma unroll
          for (int step = 0; step < kHeadSize / 16; ++step) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              const int column = Columns<Cache>::of(step, part, lane);
              query[tile][step][2 * part + half] =
                  present && column < params.head_size
                      ? *reinterpret_cast<const uint32_t*>(from + column)
                      : 0u;
            }
          }
        }
      }
    }
  }

  // A row as float16: multiplied by the power of two that brings its largest element near 2^8, so
  // that neither large nor small queries leave float16's range.
  template <typename Query>
  __device__ void load_scaled(const Query* from, int head_size, bool present, int tile, int half,
                              int lane) {
    float row[kHeadSize / 16][2][2];
    float largest = 0.0f;
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int column = Columns<Cache>::of(step, part, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool inside = present && column < head_size;
          row[step][part][i] = inside ? to_float(from[column + i]) : 0.0f;
          largest = fmaxf(largest, fabsf(row[step][part][i]));
        }
      }
    }
    const int exponent = exponent_of(quad_max(largest));
    const float up = exp2f(static_cast<float>(8 - exponent));
    scores.scale[tile][half] *= exp2f(static_cast<float>(exponent - 8));
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        query[tile][step][2 * part + half] =
            pack(__half(), row[step][part][0] * up, row[step][part][1] * up);
      }
    }
  }

  // The weights of the warp's keys in a tile, of which the first is `first_key`.
  template <int kActive>
  __device__ void weigh(const AttentionParams& params, SharedAddress keys, int32_t first_key,
                        int lane) {
    multiply_keys<Cache, kHeadSize, kActive, Shape::kKeys>(
        [&](int tile, int step, RowFragment& to) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = query[tile][step][i];
        },
        SharedRows<Cache>::key_row(keys, Shape::kPitch, lane), Shape::kPitch, weights);
    const bool masked = first_key < seen_by_all.begin || first_key + Shape::kKeys > seen_by_all.end;
    scores.template apply<kActive, Shape::kKeys>(params, block, weights, first_key, masked, lane);
    softmax.template weigh<kActive, Shape::kKeys>(weights);
  }

  template <int kActive>
  __device__ void add_values(SharedAddress values, int lane) {
    multiply_values<Cache, kHeadSize, kActive, Shape::kKeys>(
        weights, SharedRows<Cache>::value_row(values, Shape::kPitch, lane), Shape::kPitch,
        softmax.out);
  }

  // Of the row tiles only those that hold rows.
  template <typename Run>
  __device__ void with_active_tiles(Run&& run) {
    if (kTiles == 1 || block.num_rows <= kRows) return run(std::integral_constant<int, 1>());
    run(std::integral_constant<int, kTiles>());
  }

  // Adds what the other warps of the same head have gathered, in their order. `exchange` is shared
  // memory that no warp uses any more once all have come here.
  __device__ void gather(float* exchange, int heads, int warp, int lane) {
    if (heads == Shape::kWarps) return;
    constexpr int kCell = (kHeadSize / 2 + 4) * kWarpSize;
    constexpr int kCells = Shape::kStageBytes / (kCell * static_cast<int>(sizeof(float)));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int first = heads; first < Shape::kWarps; first += kCells) {
        const int end = min(first + kCells, Shape::kWarps);
        __syncthreads();
        if (warp >= first && warp < end) put(exchange + (warp - first) * kCell + lane, tile);
        __syncthreads();
        for (int other = first; other < end; ++other) {
          if (other % heads == warp) merge(exchange + (other - first) * kCell + lane, tile);
        }
      }
    }
  }

  __device__ void put(float* cell, int tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      cell[half * kWarpSize] = softmax.maximum[tile][half];
      cell[(2 + half) * kWarpSize] = softmax.sum[tile][half];
    }
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) cell[(4 + n * 4 + i) * kWarpSize] = softmax.out[tile][n][i];
    }
  }

  __device__ void merge(const float* cell, int tile) {
    float mine[2], others[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& maximum = softmax.maximum[tile][half];
      const float other = cell[half * kWarpSize];
      const float raised = fmaxf(maximum, other);
      const float base = base_of(raised);
      mine[half] = exp2_approx(maximum - base);
      others[half] = exp2_approx(other - base);
      maximum = raised;
      float& sum = softmax.sum[tile][half];
      sum = sum * mine[half] + cell[(2 + half) * kWarpSize] * others[half];
    }
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& out = softmax.out[tile][n][i];
        out = out * mine[i / 2] + cell[(4 + n * 4 + i) * kWarpSize] * others[i / 2];
      }
    }
  }

  // Calls run(row, tile, half) for each row that is there and of which this lane has columns.
  template <typename Run>
  __device__ void for_each_row(int lane, Run&& run) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kRows + half * 8 + lane / 4;
        if (row < block.num_rows) run(row, tile, half);
      }
    }
  }

  // Writes rows that nobody else has a part of.
  __device__ void write(const AttentionParams& params, int lane) const {
    for_each_row(lane, [&](int row, int tile, int half) {
      const RowOutput output =
          RowOutput::of(params, block, row, softmax.maximum[tile][half], softmax.sum[tile][half]);
      with_float_type(params.out_dtype, [&](auto type) {
        auto* const out = static_cast<decltype(type)*>(params.out);
        for_each_pair<Cache, kHeadSize>(softmax.out[tile], half, lane,
                                        [&](int column, float x, float y) {
                                          if (column < params.head_size)
                                            output.store(out, column, x, y);
                                        });
      });
      if (params.lse != nullptr && lane % 4 == 0) params.lse[output.lse_index] = output.lse;
    });
  }

  // Stores a piece: the rows of the CTA's head `head`.
  __device__ void store_piece(const AttentionParams& params, const DecodePlan& plan,
                              const PieceStore& store, const Piece& piece, int head,
                              int lane) const {
    const int head_size = params.head_size;
    const int64_t first = PieceMerger(params, plan, store).rows_of(piece.slot(piece.index), head);
    for_each_row(lane, [&](int row, int tile, int half) {
      float* const sums = store.sums + (first + row) * head_size;
      for_each_pair<Cache, kHeadSize>(softmax.out[tile], half, lane,
                                      [&](int column, float x, float y) {
                                        if (column < head_size) store_pair(sums + column, x, y);
                                      });
      if (lane % 4 == 0) {
        store.softmaxes[first + row] = {softmax.maximum[tile][half], softmax.sum[tile][half]};
      }
    });
  }
};

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

// Sequences that a CTA has stored a piece of and not yet told the others: to tell them waits for
// all that is on its way, so it is put off until the end.
struct CutSequences {
  static constexpr int kCapacity = 2;  // the first and the last of a share
  CutSequence cut[kCapacity];
};

// Puts cut sequences together where this CTA is the last. Not inlined: it needs many registers, and
// the loop over tiles would have to do without them.
__device__ __noinline__ inline void merge_pieces(const AttentionParams& params,
                                                 const DecodePlan& plan, const PieceStore& store,
                                                 const CtaRows& cta, const CutSequences& sequences,
                                                 int count) {
  __syncthreads();  // one thread has noted the sequences
  const PieceMerger merger(params, plan, store);
  for (int i = 0; i < count; ++i) {
    const CutSequence& cut = sequences.cut[i];
    if (!merger.is_last(cut)) continue;
    merger.finish(cut, [&](int head, int row, int d, const float4& sums, const float2& softmax) {
      const RowBlock block = cta.block(params, plan, cut.span, head);
      const RowOutput output = RowOutput::of(params, block, row, softmax.x, softmax.y);
      with_float_type(params.out_dtype, [&](auto type) {
        auto* const out = static_cast<decltype(type)*>(params.out);
        output.store(out, d, sums.x, sums.y);
        output.store(out, d + 2, sums.z, sums.w);
      });
      if (params.lse != nullptr && d == 0) params.lse[output.lse_index] = output.lse;
    });
  }
  __syncthreads();  // and may note others
}

template <typename Cache, int kHeadSize, int kTiles>
__global__ void __launch_bounds__(
    DecodeShape<sizeof(Cache), kHeadSize, kTiles>::kThreads,
    DecodeShape<sizeof(Cache), kHeadSize, kTiles>::kCtasPerMultiprocessor)
    decode_kernel(const __grid_constant__ AttentionParams params,
                  const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ PieceStore store) {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize, kTiles>;
  __shared__ TokenOffsets offsets[Shape::kWarps];
  __shared__ CutSequences cut;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head = warp & (plan.heads - 1), part = warp >> plan.heads_log2;
  const CtaRows cta = CtaRows::of(plan, static_cast<int>(blockIdx.x) % plan.num_columns);

  zero_rows_without_sequence(params);
  const Share share = find_share<Shape::kThreads>(params, plan, blockIdx.x / plan.num_columns);
  if (share.begin == share.end) return;

  unsigned char* const memory = dynamic_shared_memory();
  const SharedAddress stages = shared_address(memory) + warp * Shape::kKeys * Shape::kPitch;
  TileLoader<Cache, kHeadSize, kTiles> loader(params, plan, share, cta.first_head + head, part,
                                              stages, offsets[warp]);
  for (int tile = 0; tile < plan.stages; ++tile) {
    loader.load_keys(tile, tile);
    loader.load_values(tile, tile);
  }

  DecodeRows<Cache, kHeadSize, kTiles> rows;
  Walk walk(params, plan, share);
  rows.begin(params, cta.block(params, plan, walk.span(), head), lane);
  int num_cut = 0;
  int stage = 0;
  for (int next = plan.stages;; ++next) {
    const SharedAddress keys = stages + stage * Shape::kStageBytes;
    const bool last = walk.last_of_piece();
    wait_for_oldest<1>(plan.stages);
    __syncthreads();  // keeps the warps in step: what is neighbouring in memory is read together
    const int32_t first_key = walk.first_key(plan) + part * Shape::kKeys;
    rows.with_active_tiles([&](auto active) {
      rows.template weigh<decltype(active)::value>(params, keys, first_key, lane);
    });
    __syncwarp();
    if (last) {
      wait_for_oldest<2>(plan.stages);
    } else {
      loader.load_keys(next, stage);
      wait_for_oldest<1>(plan.stages);
    }
    __syncwarp();
    rows.with_active_tiles([&](auto active) {
      rows.template add_values<decltype(active)::value>(keys + Shape::kHalfBytes, lane);
    });
    __syncwarp();
    if (last) {
      rows.softmax.finish();
      rows.gather(reinterpret_cast<float*>(memory + stage * Shape::kStageBytes), plan.heads, warp,
                  lane);
      const Piece piece = Piece::at(plan, share, walk);
      if (piece.count == 1) {
        if (part == 0) rows.write(params, lane);
      } else {
        if (part == 0) rows.store_piece(params, plan, store, piece, head, lane);
        if (threadIdx.x == 0) cut.cut[num_cut] = {piece, rows.block.num_rows, walk.span()};
        if (++num_cut == CutSequences::kCapacity) {
          merge_pieces(params, plan, store, cta, cut, num_cut);
          num_cut = 0;
        }
      }
      if (plan.heads < Shape::kWarps) __syncthreads();  // the stage is not read any more
      loader.load_keys(next, stage);
    }
    loader.load_values(next, stage);
    walk.advance(params, plan);
    if (walk.done()) break;
    if (last) rows.begin(params, cta.block(params, plan, walk.span(), head), lane);
    stage = stage + 1 == plan.stages ? 0 : stage + 1;
  }
  if (num_cut > 0) merge_pieces(params, plan, store, cta, cut, num_cut);
}

template <typename Cache, int kHeadSize, int kTiles>
struct Decode {
  using Shape = DecodeShape<sizeof(Cache), kHeadSize, kTiles>;

  static DecodePlan plan(const AttentionParams& params, const DeviceLimits& limits) {
    constexpr int kStaticBytes = Shape::kWarps * sizeof(TokenOffsets) + sizeof(CutSequences) + 64;
    return plan_decode<Shape>(params, limits, kStaticBytes);
  }

  static void launch(const AttentionParams& params, const DecodePlan& plan, const PieceStore& store,
                     cudaStream_t stream) {
    const Grid grid{static_cast<int64_t>(plan.num_shares) * plan.num_columns};
    cuda::launch(params.op, decode_kernel<Cache, kHeadSize, kTiles>, grid, Shape::kThreads,
                 plan.stages * Shape::kStageBytes, stream, params, plan, store);
  }
};

}  // namespace paged_ops::cuda
