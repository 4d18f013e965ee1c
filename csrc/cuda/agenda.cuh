// The tiles of a CTA, and where their tokens lie, looked up some tiles ahead.
//
// A token is found by two reads, one after the other: of the sequence's length and of the block
// table. They are made for a batch of tiles at once, one token by each thread, and what they give
// is put into shared memory when the batch before has been fetched.
#pragma once

#include <cstdint>

#include "schedule.cuh"

namespace paged_ops::cuda {

template <typename Cache, int kThreads>
class Agenda {
 public:
  static constexpr int kEntries = 2 * kThreads;  // two batches of tokens
  // Of a token: bytes from the first token of a head; negative: no token.
  struct Place {
    int64_t key;
    int64_t value;
  };
  struct Memory {
    alignas(16) Place places[kEntries];
    Tile tiles[64];  // the batches that are fetched and looked up, and some that are computed
  };

  __device__ Agenda(const AttentionParams& params, const DecodePlan& plan, const Share& share,
                    Memory& memory)
      : params_(params), plan_(plan), memory_(memory), walk_(params, plan, share) {}

  // Number of tiles that are known; no more than `index` of them: the share ends there.
  __device__ int num_tiles() const { return num_tiles_; }
  __device__ const Tile& tile(int index) const { return memory_.tiles[index % kRing]; }
  // Where in Memory::places the tokens of a tile begin.
  __device__ int entry(int index) const { return index << plan_.tile_keys_log2 & (kEntries - 1); }

  // What the loop does for tile `index` = -1, 0, 1, ..., all threads: before it is fetched, and
  // after. Tile -1 is none: with it the first batch is asked for.
  __device__ void place(int index) {
    if (index >= 0 && begins_batch(index)) place();
  }
  __device__ void look_up(int index) {
    if (index < 0 || begins_batch(index)) look_up();
  }

 private:
  static constexpr int kRing = 64;

  __device__ bool begins_batch(int index) const { return entry(index) % kThreads == 0; }

  __device__ void look_up() {
    const int32_t tiles = kThreads >> plan_.tile_keys_log2;
    key_ = -1;
#pragma unroll 1
    for (int32_t first = 0; first < tiles && !walk_.done();) {
      const int32_t count = min(tiles - first, walk_.left());
      const int32_t mine = (static_cast<int32_t>(threadIdx.x) >> plan_.tile_keys_log2) - first;
      if (0 <= mine && mine < count) {
        const int32_t in_tile = threadIdx.x & (plan_.tile_keys() - 1);
        const Tile tile = walk_.tile(plan_, mine);
        key_ = tile.first_key + in_tile;
        if (key_ < tile.span.begin || key_ >= tile.span.seq_len) key_ = -1;
        const int64_t row = walk_.seq() * params_.block_table_stride;
        if (key_ >= 0) block_ = params_.block_table[row + block_of(key_)];
        if (in_tile == 0) memory_.tiles[(num_tiles_ + mine) % kRing] = tile;
      }
      num_tiles_ += count;
      first += count;
      walk_.advance(params_, plan_, count);
    }
  }

  // Divisions are slow, and block sizes mostly powers of two.
  __device__ int32_t block_of(int32_t key) const {
    return plan_.block_size_log2 >= 0 ? key >> plan_.block_size_log2 : key / params_.block_size;
  }

  // Waits for what look_up has asked for.
  __device__ void place() {
    const int64_t slot = key_ - block_of(key_) * params_.block_size;
    const auto offset = [&](const CacheHalf<const void*>& half) {
      return key_ < 0 ? -1
                      : (int64_t{block_} * half.stride_block + slot * half.stride_slot) *
                            static_cast<int64_t>(sizeof(Cache));
    };
    memory_.places[batch_ + threadIdx.x] = {offset(params_.key_cache), offset(params_.value_cache)};
    batch_ ^= kThreads;
  }

  const AttentionParams& params_;
  const DecodePlan& plan_;
  Memory& memory_;
  Walk walk_;
  int num_tiles_ = 0;  // that have been looked up
  int batch_ = 0;      // where the next batch goes
  int32_t key_ = -1;   // of the batch that has been looked up; negative: no token
  int32_t block_ = 0;  // not widened before `place`: that would wait for it
};

}  // namespace paged_ops::cuda
