// How a call is cut up, decided on the host from shapes alone: no length is read. Pure functions.
//
// An example: bfloat16, 32 query heads over 8 KV heads of 128, on 132 multiprocessors. Head sizes
// from 97 to 128 are computed as 128. A stage is 4 heads x 32 keys x (K + V), 66 KB with room for
// results; 3 of them fit into 228 KB, so each multiprocessor has one CTA, and there are 66 shares
// of two CTAs, or 64 of them for 64 sequences.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace paged_ops::cuda {

// What the device has room for.
struct DeviceLimits {
  int multiprocessors;
  int shared_per_multiprocessor;  // bytes
  int shared_per_cta;
  float bandwidth;  // of its memory by its specification, bytes a second; 0: unknown
};

// What one warp of the decode kernel computes at once, for a cache with elements of kElementBytes
// and head sizes up to kHeadSize.
template <int kElementBytes, int kHeadSize>
struct DecodeTile {
  static constexpr int kRowBytes = kHeadSize * kElementBytes;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kKeys = kRowBytes >= 192 && kElementBytes == 2 ? 16 : 32;
  static constexpr int kHalfBytes = kKeys * kRowBytes;  // of the keys; the values come after
  static constexpr int kWarpBytes = 2 * kHalfBytes;
  // Threads that load one row: as many as it has chunks of 16 bytes, or some more.
  static constexpr int kRowThreads = kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  // Floats from row to row of results: the sums, the maximum, the sum of the weights, padding.
  static constexpr int kResultPitch = kHeadSize + 4;
  // Of 8 query rows: registers have no room for more.
  static constexpr int kMaxTiles = kHeadSize <= 128 ? 2 : 1;
};

// What a CTA of kNumWarps warps computes at once.
template <int kElementBytes, int kHeadSize, int kNumWarps>
struct DecodeShape : DecodeTile<kElementBytes, kHeadSize> {
  using Tile = DecodeTile<kElementBytes, kHeadSize>;
  static constexpr int kWarps = kNumWarps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStageKeys = kWarps * Tile::kKeys;
  static constexpr int kMaxStages = 6;
  static constexpr int kResultBytes = 8 * Tile::kMaxTiles * Tile::kResultPitch * 4;
  // Room for the warps' keys and values, or for their results.
  static constexpr int kStageBytes = kWarps * std::max(Tile::kWarpBytes, kResultBytes);
  static constexpr int kTileBytes = kWarps * Tile::kWarpBytes;
  static constexpr int kResultRows = kStageBytes / (Tile::kResultPitch * 4);  // that fit into it
  static constexpr int kCtasPerMultiprocessor = 3 * kStageBytes <= 111 << 10 ? 2 : 1;
};

// Warps of a CTA: as many as fill most of a multiprocessor's shared memory with three stages. Two
// are for devices that have less than half of it (compute capability 8.6, 8.9, 12.0).
template <int kElementBytes, int kHeadSize>
inline constexpr int kWarpsOfLarge =
    DecodeTile<kElementBytes, kHeadSize>::kWarpBytes <= 8 << 10 ? 8 : 4;
inline constexpr int kWarpsOfSmall = 2;

// The prefill kernel of a call, if it starts beside the decode kernel on multiprocessors that have
// none of its CTAs; else zeros.
struct PrefillBeside {
  float cost;     // time for a query token and a key that it sees, over that of reading a key
  float rounds;   // of CTAs, all multiprocessors together, if all query tokens were its own
  float readers;  // part of the multiprocessors that can read as fast as the memory
};

// How the work is cut among CTAs, by how many KV heads each of them has.
struct DecodeCut {
  int32_t heads_log2;
  int32_t tile_keys_log2;
  int32_t num_columns;          // groups of KV heads, times row_chunks
  int32_t num_shares;           // of the keys; each is computed by num_columns CTAs side by side
  uint32_t num_shares_inverse;  // 2^32 / num_shares, rounded down
  PrefillBeside beside;

  // KV heads of a CTA, and keys of a tile: registers have no room for what can be worked out.
  __host__ __device__ int32_t heads() const { return 1 << heads_log2; }
  __host__ __device__ int32_t tile_keys() const { return 1 << tile_keys_log2; }
  int32_t num_ctas() const { return num_shares * num_columns; }
};

// What the decode kernel is told beside the params.
struct DecodePlan : DecodeCut {
  uint32_t max_tiles;     // of a batch that is cut like this; one of more is cut like `of_long`
  DecodeCut of_long;      // zeros if none can be
  int32_t max_query_len;  // of the sequences that are decoded
  int32_t tiles;          // of 8 query rows
  int32_t row_chunks;     // CTAs that share the query rows of a group: 1 unless they are too many
  int32_t rows_per_cta;   // at most
  int32_t warps;
  int32_t stages;
  int32_t block_size_log2;  // -1: not a power of two
  int32_t group_size;
  int32_t result_pitch;
  int32_t result_rows;  // that fit into a stage
  bool batch_invariant;
  int32_t min_chunk_tiles;  // in the batch-invariant mode: of a chunk, unless
  int32_t max_chunks_log2;  // the sequence would have more than 2^this
  bool prefill_follows;     // on the same call's other rows: it may start where there is room
};

// CTAs that run at once on a multiprocessor, and the stages that each has: 2 at least, or the CTA
// does not fit.
struct Residency {
  int ctas;
  int stages;
};

template <typename Shape>
Residency residency(const DeviceLimits& limits, int static_bytes) {
  constexpr int kReserved = 1024;  // that each CTA takes besides
  for (int ctas = Shape::kCtasPerMultiprocessor;; --ctas) {
    const int room =
        std::min(limits.shared_per_multiprocessor / ctas - kReserved, limits.shared_per_cta) -
        static_bytes;
    const int stages = std::min(room / Shape::kStageBytes, Shape::kMaxStages);
    if (stages >= 3 || ctas == 1) return {ctas, stages};
  }
}

// Rounded down.
constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// Tiles of 8 query rows. Two where the query heads of one token need them, and where it seems that
// most sequences have several tokens; a few with many have a kernel of their own.
inline int row_tiles_for(const AttentionParams& params) {
  const bool few_tokens_each = params.num_tokens > params.num_seqs &&
                               params.num_tokens * params.group_size() <= params.num_seqs * 16;
  return params.group_size() > 8 || (few_tokens_each && !params.batch_invariant) ? 2 : 1;
}

// CTAs that share the keys of a row on CUDA cores, where one for each of so many would not fill the
// device. In the batch-invariant mode a row is never cut.
inline int splits_for(const AttentionParams& params, const DeviceLimits& limits, int64_t ctas) {
  constexpr int64_t kCtasPerMultiprocessor = 4, kMinKeys = 128, kMost = 64;
  if (params.batch_invariant || ctas == 0) return 1;
  const int64_t wanted = limits.multiprocessors * kCtasPerMultiprocessor / ctas;
  const int64_t most = std::min(params.max_blocks * params.block_size / kMinKeys, kMost);
  return static_cast<int>(std::max<int64_t>(std::min(wanted, most), 1));
}

// Shares of the keys: as many as CTAs run at once. A thirty-second part of them is given up if the
// others are a multiple of the sequences or the other way round: sequences of one length are then
// cut where they end, and those that are whole need not be put together.
inline int num_shares_for(int most, int64_t num_seqs) {
  if (num_seqs == 0) return most;
  const int64_t seqs_per_share = (num_seqs + most - 1) / most;
  if (num_seqs % seqs_per_share != 0) return most;
  const int64_t shares_with_seqs = num_seqs / seqs_per_share;
  const int64_t even = most / shares_with_seqs * shares_with_seqs;
  return static_cast<int>((most - even) * 32 <= most ? even : most);
}

// In the batch-invariant mode a sequence is cut into chunks of so many bytes: with half as many the
// ends of pieces are seen in large batches, with twice as many a single sequence has too few CTAs.
inline constexpr int kMinChunkBytes = 512 << 10;

// A long sequence is cut into so many chunks instead: twice the CTAs that run at once for it, so
// that shares are even where it has others beside it. Where the block table has no room for
// sequences of so many chunks they need no scratch memory.
inline int max_chunks_log2_for(int resident_shares, int64_t chunks_of_table) {
  int log2 = log2_of(std::clamp(2 * resident_shares, 32, 64));
  while (log2 > 0 && int64_t{1} << (log2 - 1) >= chunks_of_table) --log2;
  return log2;
}

// For `ctas` that run at once, with so many query rows.
template <typename Shape>
DecodeCut cut_decode(const AttentionParams& params, int ctas, int row_chunks, int heads_log2) {
  DecodeCut cut{};
  cut.heads_log2 = heads_log2;
  cut.tile_keys_log2 = log2_of(Shape::kStageKeys) - heads_log2;
  cut.num_columns = params.num_kv_heads / cut.heads() * row_chunks;
  const int most_shares = Shape::kResultRows * Shape::kResultRows;  // for merging in two steps
  const int resident_shares = std::clamp(ctas / cut.num_columns, 1, most_shares);
  cut.num_shares = num_shares_for(resident_shares, params.num_seqs);
  cut.num_shares_inverse = UINT32_MAX / static_cast<uint32_t>(cut.num_shares);
  return cut;
}

// Log2 of the KV heads of a CTA.
struct HeadsLog2 {
  int usual;
  int of_long;  // if the lengths, which are not known here, give CTAs over kLongShareKeys each
};

// Keys of a CTA of one head: with more than these, what pieces cost is little beside what longer
// runs of memory bring.
inline constexpr int kLongShareKeys = 3072;

// With fewer heads to a CTA there are fewer shares: sequences are cut less often, and into pieces
// of fewer rows. With more of them a CTA reads longer runs of memory.
//
// A few sequences are cut into many pieces, so one head is best, unless they are long. Many are cut
// least by the number of heads that lets each share have whole sequences, if these are of one
// length: all heads that a CTA could have if pieces are small, for others cost too much where
// lengths differ; else half as many, or fewer; half as many if none does. In the batch-invariant
// mode batches of all sizes must have the same.
template <typename Shape>
HeadsLog2 heads_log2_for(const AttentionParams& params, int ctas, int row_chunks, int rows) {
  constexpr int kRunBytes = 512, kSmallPieceBytes = 1024;  // the latter in the cache's elements
  int most = 0;
  while ((2 << most) <= Shape::kWarps && params.num_kv_heads % (2 << most) == 0) ++most;
  const int of_runs = std::min(most, log2_of(std::max(kRunBytes / Shape::kRowBytes, 1)));
  if (params.batch_invariant) return {of_runs, of_runs};
  if (params.num_seqs < (rows > 8 ? 16 : 8)) return {0, of_runs};
  if (params.num_seqs < 16) return {of_runs, of_runs};
  const int half = std::max(most - 1, 0);
  const bool small_pieces = rows * Shape::kRowBytes <= kSmallPieceBytes;
  for (int heads_log2 = small_pieces ? most : half; heads_log2 >= of_runs; --heads_log2) {
    const DecodeCut cut = cut_decode<Shape>(params, ctas, row_chunks, heads_log2);
    if (params.num_seqs % cut.num_shares == 0) return {heads_log2, heads_log2};
  }
  return {half, half};
}

template <typename Shape>
DecodePlan plan_decode(const AttentionParams& params, const DeviceLimits& limits,
                       int static_bytes) {
  DecodePlan plan{};
  const int group_size = params.group_size();
  plan.tiles = std::min(row_tiles_for(params), Shape::kMaxTiles);
  const int rows = 8 * plan.tiles;
  const bool one_token = params.query_start_loc == nullptr;
  plan.max_query_len = one_token ? 1 : std::max(rows / group_size, 1);
  plan.row_chunks = (group_size + rows - 1) / rows;
  plan.rows_per_cta = std::min(plan.max_query_len * group_size, rows);
  const Residency resident = residency<Shape>(limits, static_bytes);
  plan.warps = Shape::kWarps;
  plan.stages = resident.stages;
  plan.result_pitch = Shape::kResultPitch;
  plan.result_rows = Shape::kResultRows;
  const int ctas = limits.multiprocessors * resident.ctas;
  const HeadsLog2 heads_log2 =
      heads_log2_for<Shape>(params, ctas, plan.row_chunks, plan.rows_per_cta);
  static_cast<DecodeCut&>(plan) =
      cut_decode<Shape>(params, ctas, plan.row_chunks, heads_log2.usual);
  plan.max_tiles = UINT32_MAX;
  if (heads_log2.of_long != heads_log2.usual) {
    plan.of_long = cut_decode<Shape>(params, ctas, plan.row_chunks, heads_log2.of_long);
    plan.max_tiles = plan.num_shares * (kLongShareKeys / plan.tile_keys());
  }
  const bool power_of_two = (params.block_size & (params.block_size - 1)) == 0;
  plan.block_size_log2 = power_of_two ? log2_of(params.block_size) : -1;
  plan.batch_invariant = params.batch_invariant;
  plan.min_chunk_tiles = kMinChunkBytes / Shape::kTileBytes;
  const int64_t chunk_keys = plan.min_chunk_tiles * plan.tile_keys();
  const int64_t chunks_of_table =
      (params.max_blocks * params.block_size + chunk_keys - 1) / chunk_keys;
  plan.max_chunks_log2 = max_chunks_log2_for(ctas / plan.num_columns, chunks_of_table);
  plan.group_size = group_size;
  return plan;
}

}  // namespace paged_ops::cuda
