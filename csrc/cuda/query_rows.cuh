// From the query to shared memory: the rows of a block, for the matrix units.
#pragma once

#include <cstdint>

#include "prefill_plan.h"
#include "ptx.cuh"

namespace paged_ops::cuda {

// Rows first .. first + kCount - 1 of a block, by kThreads threads.
template <int kHeadSize, int kCount, int kThreads>
struct QueryRows {
  const AttentionParams& params;
  const PrefillPlan& plan;
  const RowBlock& block;
  int first;
  int thread;

  // Begins to put them where place(row, byte) is, with zeros where there is no row and past the end
  // of the head. To be waited for like other copies.
  template <typename Place>
  __device__ void load(Place&& place) const {
    if (plan.wide_query) {
      load_pieces<16>(place);
    } else {
      load_pieces<4>(place);
    }
    commit_copies();
  }

 private:
  template <int kBytes, typename Place>
  __device__ void load_pieces(Place&& place) const {
    constexpr int kPieces = kHeadSize * 2 / kBytes;
#pragma unroll 4
    for (int i = thread; i < kCount * kPieces; i += kThreads) {
      const int row = first + i / kPieces, column = i % kPieces * kBytes;
      const bool present = row < block.num_rows && column < params.head_size * 2;
      const char* const from = plan.query_row(params, block, row) + column;
      unsigned char* const to = place(row, column);
      if constexpr (kBytes == 16) {
        copy_async_16(shared_address(to), from, present);
      } else {
        *reinterpret_cast<uint32_t*>(to) = present ? *reinterpret_cast<const uint32_t*>(from) : 0u;
      }
    }
  }
};

}  // namespace paged_ops::cuda
