// Attention of many query rows per sequence at the speed of the matrix units: FlashAttention-2
// (Dao, 2023) over a paged cache.
//
// A CTA of four warps takes a block of the rows of one KV head: all query heads of the group share
// its keys and values. Each warp owns 32 of the rows, two fragments, so that what it reads from
// shared memory is used twice: at mma.sync's speed that memory is nearly as busy as the matrix
// units. Two CTAs share a multiprocessor, and one computes exponentials while the other multiplies.
//
// A tile of keys and values is fetched while the one before is computed with, the addresses of its
// rows are found a tile earlier still, and their blocks are looked up one before that.
//
// A block of rows depends on its sequence alone, and all its keys are added up by one CTA in their
// order: the result depends neither on the rest of the batch nor on timing.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "fragments.cuh"
#include "heuristics.h"
#include "launch.h"
#include "prefill.h"
#include "prefill_plan.h"
#include "ptx.cuh"
#include "query_rows.cuh"
#include "row_blocks.cuh"
#include "row_output.cuh"
#include "row_scores.cuh"
#include "row_softmax.cuh"

namespace paged_ops::cuda {

// Sizes of the prefill kernel. A row's pitch is an odd number of 16 bytes: eight rows one below the
// other then lie in different banks, and all offsets are known when the code is compiled.
template <typename Cache_, int kHeadSize_, int kKeys_>
struct PrefillShape {
  using Cache = Cache_;
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kCtasPerMultiprocessor = 2;
  // Of 16 rows that a warp computes: its sums take half a register of a lane per element and row.
  static constexpr int kTiles = kHeadSize <= 128 ? 2 : 1;
  static constexpr int kWarpRows = kTiles * kRows;
  static constexpr int kCtaRows = kWarps * kWarpRows;
  static constexpr int kKeys = kKeys_;                                              // of a tile
  static constexpr int kChunks = kHeadSize * static_cast<int>(sizeof(Cache)) / 16;  // of a row
  static constexpr int kPitch = (kChunks | 1) * 16;
  static constexpr int kHalfBytes = kKeys * kPitch;  // a tile's keys, then its values
  static constexpr int kStageBytes = 2 * kHalfBytes;
  static constexpr int kQueryPitch = (kHeadSize / 8 | 1) * 16;
  static constexpr int kQueryBytes = kCtaRows * kQueryPitch;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes;
  // Threads that load one row: as many as it has chunks of 16 bytes, or some more.
  static constexpr int kRowThreads = kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
};

// Where a token's key and value lie; negative: there is no token.
struct alignas(16) TokenAddresses {
  int64_t key;
  int64_t value;
};

template <typename Shape>
struct PrefillMemory {
  TokenAddresses tokens[2][Shape::kKeys];  // of a tile, in turn
  TokenAddresses head;                     // of slot 0 of block 0
  const int32_t* blocks;                   // the sequence's row of the block table
  TileRange<Shape::kKeys> tiles;
  RowBlock block;
  RowKeys row_keys[Shape::kWarps];
  float query_scales[Shape::kCtaRows];  // of a query that has been narrowed
};

// Fetches the keys that a CTA's rows see, and their values, in tiles that begin at multiples of
// kKeys. To be called by all threads; a barrier has to lie between `place` and `load`.
//
// A tile's token is looked up by two threads, one for the key and one for the value.
template <typename Shape>
class KeyTiles {
  using Cache = typename Shape::Cache;

 public:
  __device__ KeyTiles(const AttentionParams& params, const PrefillPlan& plan,
                      PrefillMemory<Shape>& memory)
      : params_(params), plan_(plan), memory_(memory) {}

  // By one thread, before a barrier and all else.
  __device__ void begin(int64_t seq, const RowBlock& block) const {
    const auto address = [&](const CacheHalf<const void*>& half) {
      return reinterpret_cast<int64_t>(half.data) +
             block.kv_head * half.stride_head * static_cast<int64_t>(sizeof(Cache));
    };
    memory_.head = {address(params_.key_cache), address(params_.value_cache)};
    memory_.blocks = params_.block_table + seq * params_.block_table_stride;
    memory_.tiles = TileRange<Shape::kKeys>::of(params_, block);
  }

  __device__ int count() const { return memory_.tiles.count; }
  __device__ int32_t first_key(int tile) const { return memory_.tiles.first_key(tile); }

  // Asks for the block of the thread's token in a tile.
  __device__ void look_up(int tile) {
    block_ = -1;
    if (!is_needed()) return;
    const int32_t key = key_of_thread(tile);
    const bool present = memory_.tiles.contains(key);
    if (present) block_ = load_fresh(memory_.blocks + plan_.block_size.quotient(key));
  }

  // Puts down where the token that was looked up lies.
  __device__ void place(int tile) {
    if (!is_needed()) return;
    const bool is_key = threadIdx.x < Shape::kKeys;
    const auto& half = is_key ? params_.key_cache : params_.value_cache;
    const int32_t key = key_of_thread(tile);
    const int64_t slot = plan_.block_size.remainder(key);
    const int64_t element = block_ * half.stride_block + slot * half.stride_slot;
    const int64_t address = (is_key ? memory_.head.key : memory_.head.value) +
                            element * static_cast<int64_t>(sizeof(Cache));
    TokenAddresses& token = memory_.tokens[tile & 1][threadIdx.x % Shape::kKeys];
    (is_key ? token.key : token.value) = block_ < 0 ? -1 : address;
  }

  // Begins to fetch a tile: 16 bytes by each thread. Zeros where there is no token.
  __device__ void load(int tile, SharedAddress keys) const {
    if (Shape::kRowThreads > Shape::kChunks && column() >= Shape::kChunks * 16) return;
    constexpr int kRowsAtOnce = Shape::kThreads / Shape::kRowThreads;
    const int first = threadIdx.x / Shape::kRowThreads;
    const bool in_head = column() < params_.head_size * static_cast<int>(sizeof(Cache));
    const SharedAddress to = keys + first * Shape::kPitch + column();
    TokenAddresses tokens[Shape::kKeys / kRowsAtOnce];  // all read before the first is used
#pragma unroll
    for (int i = 0; i < Shape::kKeys / kRowsAtOnce; ++i) {
      tokens[i] = memory_.tokens[tile & 1][first + i * kRowsAtOnce];
    }
#pragma unroll
    for (int i = 0; i < Shape::kKeys / kRowsAtOnce; ++i) {
      const SharedAddress row = to + i * kRowsAtOnce * Shape::kPitch;
      load_row(row, tokens[i].key, in_head);
      load_row(row + Shape::kHalfBytes, tokens[i].value, in_head);
    }
  }

 private:
  __device__ int32_t key_of_thread(int tile) const {
    return first_key(tile) + static_cast<int32_t>(threadIdx.x % Shape::kKeys);
  }

  // Two threads for a token, where there are that few tokens not all threads.
  __device__ static bool is_needed() {
    return 2 * Shape::kKeys >= Shape::kThreads || threadIdx.x < 2 * Shape::kKeys;
  }

  __device__ static int column() { return threadIdx.x % Shape::kRowThreads * 16; }

  __device__ static void load_row(SharedAddress to, int64_t address, bool in_head) {
    const bool present = in_head && static_cast<int32_t>(address >> 32) >= 0;
    copy_async_16(to, reinterpret_cast<const void*>(address + column()), present);
  }

  const AttentionParams& params_;
  const PrefillPlan& plan_;
  PrefillMemory<Shape>& memory_;
  int32_t block_ = -1;  // of the token that has been looked up; negative: no token
};

// The power of two that brings `largest` near 2^8; that of 1 for 0 and for what is not a number.
__device__ inline float scale_to_float16(float largest) {
  return exp2f(static_cast<float>(8 - exponent_of(largest)));
}

// A warp's query rows as float16, for a float8 cache: each multiplied by a power of two, so that
// neither large nor small queries leave float16's range, and in the order of Columns.
template <typename Shape>
__device__ void narrow_query(DType dtype, unsigned char* rows, float* scales, int lane) {
  constexpr int kWords = Shape::kHeadSize / 2, kOfLane = (kWords + kWarpSize - 1) / kWarpSize;
  with_matrix_type(dtype, [&](auto type) {
#pragma unroll 1
    for (int row = 0; row < Shape::kWarpRows; ++row) {
      auto* const words = reinterpret_cast<uint32_t*>(rows + row * Shape::kQueryPitch);
      float2 pairs[kOfLane];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int word = lane + i * kWarpSize;
        pairs[i] = unpack(type, word < kWords ? words[word] : 0u);
        largest = fmaxf(largest, fmaxf(fabsf(pairs[i].x), fabsf(pairs[i].y)));
      }
      const float up = scale_to_float16(warp_max(largest));
      __syncwarp();  // all have read their words
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int word = lane + i * kWarpSize;
        const int in_order = (word & ~7) | (word & 1) << 2 | (word >> 1 & 3);
        if (word < kWords) words[in_order] = pack(__half(), pairs[i].x * up, pairs[i].y * up);
      }
      if (lane == 0) scales[row] = 1.0f / up;
    }
  });
  __syncwarp();
}

// The query rows of one warp, and what they have gathered.
template <typename Shape>
struct PrefillRows {
  using Cache = typename Shape::Cache;
  static constexpr int kTiles = Shape::kTiles;
  static constexpr int kKeys = Shape::kKeys;

  RowScores<kTiles> scores;
  RowSoftmax<kTiles, Shape::kHeadSize> softmax;

  __device__ void begin(const AttentionParams& params, int kv_head) {
    scores = RowScores<kTiles>::of(params, kv_head);
    softmax.reset();
  }

  // Takes in a tile of keys and values. The lane's parts of the addresses of fragments are given.
  __device__ void attend(const AttentionParams& params, const RowBlock& block, int first_row,
                         const float* query_scales, SharedAddress query_row, SharedAddress key_row,
                         SharedAddress value_row, int32_t first_key, bool masked, int lane) {
    float logits[kTiles][kKeys / 8][4];
    const auto query = [&](int tile, int step, RowFragment& fragment) {
      load_matrices(query_row + tile * kRows * Shape::kQueryPitch + step * 32, fragment);
    };
    multiply_keys<Cache, Shape::kHeadSize, kTiles, kKeys>(query, key_row, Shape::kPitch, logits);
    scores.template apply<kKeys>(params, block, first_row, query_scales, logits, first_key, masked,
                                 lane);
    softmax.template make_room<kKeys>(logits, scores.factor);
    const auto weight = [&](int tile, int n, RowFragment& fragment) {
      softmax.template weigh<Operand<Cache>, kKeys>(logits, scores.factor, tile, n, fragment);
    };
    multiply_values<Cache, Shape::kHeadSize, kTiles, kKeys>(weight, value_row, Shape::kPitch,
                                                            softmax.out);
  }
};

// Puts the query of a block into shared memory, and what the CTA's threads have to know of it.
template <typename Shape>
__device__ void begin_block(const AttentionParams& params, const PrefillPlan& plan,
                            const KeyTiles<Shape>& tiles, int64_t seq, const RowBlock& block,
                            unsigned char* query, PrefillMemory<Shape>& memory) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first_row = warp * Shape::kWarpRows;
  const QueryRows<Shape::kHeadSize, Shape::kCtaRows, Shape::kThreads> rows{
      params, plan, block, 0, static_cast<int>(threadIdx.x)};
  rows.load([&](int row, int byte) { return query + row * Shape::kQueryPitch + byte; });
  if (threadIdx.x == 0) {
    memory.block = block;
    tiles.begin(seq, block);
  }
  if (lane == 0) {
    const int num_rows = min(block.num_rows - first_row, Shape::kWarpRows);
    memory.row_keys[warp] =
        num_rows > 0 ? RowKeys::of(params, block, first_row, num_rows) : RowKeys{};
  }
  if constexpr (kIsFloat8<typename Shape::Cache>) {
    wait_for_copies<0>();
    __syncthreads();
    narrow_query<Shape>(params.query_dtype, query + first_row * Shape::kQueryPitch,
                        memory.query_scales + first_row, lane);
  }
  __syncthreads();
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerMultiprocessor)
    prefill_kernel(const __grid_constant__ AttentionParams params,
                   const __grid_constant__ PrefillPlan plan) {
  using Fragments = SharedRows<typename Shape::Cache>;
  wait_where_needed(plan);
  __shared__ PrefillMemory<Shape> shared;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first_row = warp * Shape::kWarpRows;
  const int kv_head = static_cast<int>(blockIdx.x) % params.num_kv_heads;
  int64_t seq = 0;
  const RowBlock own = plan.blocks.at(params, blockIdx.x / params.num_kv_heads, kv_head, &seq);
  if (own.num_rows == 0) return;

  unsigned char* const query = dynamic_shared_memory();
  const SharedAddress stages = shared_address(query) + Shape::kQueryBytes;
  const SharedAddress query_row = SharedRows<__half>::value_row(
      shared_address(query + first_row * Shape::kQueryPitch), Shape::kQueryPitch, lane);
  KeyTiles<Shape> tiles(params, plan, shared);
  begin_block(params, plan, tiles, seq, own, query, shared);
  const RowBlock& block = shared.block;
  const float* const query_scales =
      kIsFloat8<typename Shape::Cache> ? shared.query_scales : nullptr;
  PrefillRows<Shape> rows;
  rows.begin(params, kv_head);
  tiles.look_up(0);
  tiles.place(0);
  tiles.look_up(1);
  __syncthreads();
  tiles.load(0, stages);
  commit_copies();
  tiles.place(1);
  tiles.look_up(2);
#pragma unroll 1
  for (int index = 0; index < tiles.count(); ++index) {
    wait_for_copies<0>();  // of this tile
    __syncthreads();       // all have it, and are done with the one before
    tiles.load(index + 1, stages + ((index + 1) & 1) * Shape::kStageBytes);
    commit_copies();
    tiles.place(index + 2);
    tiles.look_up(index + 3);
    const RowKeys& keys = shared.row_keys[warp];
    const int32_t first_key = tiles.first_key(index), last_key = first_key + Shape::kKeys - 1;
    if (first_key >= keys.any.end || last_key < keys.any.begin) continue;
    const bool masked = first_key < keys.all.begin || last_key >= keys.all.end;
    const SharedAddress stage = stages + (index & 1) * Shape::kStageBytes;
    rows.attend(params, block, first_row, query_scales, query_row,
                Fragments::key_row(stage, Shape::kPitch, lane),
                Fragments::value_row(stage + Shape::kHalfBytes, Shape::kPitch, lane), first_key,
                masked, lane);
  }
  wait_for_copies<0>();  // of the tile after the last, which is zeros
  write_rows<typename Shape::Cache>(params, plan.wide_out, block, first_row, rows.softmax, lane);
}

template <typename Shape>
void launch_shape(const AttentionParams& params, int32_t min_query_len, cudaStream_t stream) {
  const PrefillPlan plan = PrefillPlan::of(params, Shape::kCtaRows, min_query_len);
  launch<prefill_kernel<Shape>>(params.op, {plan.num_places(params)}, Shape::kThreads,
                                Shape::kSharedBytes, stream, params, plan);
}

template <typename Cache, int kHeadSize>
void launch_prefill(const AttentionParams& params, int32_t min_query_len,
                    const DeviceLimits& limits, cudaStream_t stream) {
  constexpr int kKeys = kHeadSize <= 128 ? 64 : 32;
  constexpr int kLeast = 99 << 10;  // bytes of shared memory: compute capability 8.6, 8.9, 12.0
  using Shape = PrefillShape<Cache, kHeadSize, kKeys>;
  constexpr int kNeeded = Shape::kSharedBytes + sizeof(PrefillMemory<Shape>);
  if constexpr (kNeeded > kLeast) {
    using Smaller = PrefillShape<Cache, kHeadSize, kKeys / 2>;
    static_assert(Smaller::kSharedBytes + sizeof(PrefillMemory<Smaller>) <= kLeast);
    if (kNeeded > limits.shared_per_cta) {
      return launch_shape<Smaller>(params, min_query_len, stream);
    }
  }
  launch_shape<Shape>(params, min_query_len, stream);
}

}  // namespace paged_ops::cuda
