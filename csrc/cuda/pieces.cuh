// Putting the pieces of a sequence together: the last CTA to arrive adds them up in their order, so
// the result does not depend on who that is. Many pieces meet in two steps, first some of them and
// then what these give, since one CTA alone would read for longer than it took to make them.
#pragma once

#include <cstdint>

#include "../params.h"
#include "arrival.cuh"
#include "row_output.cuh"
#include "schedule.cuh"

namespace paged_ops::cuda {

// A CTA's part of a piece, for all its rows.
__host__ __device__ inline int32_t floats_of_cell(const DecodePlan& plan) {
  return plan.heads() * plan.rows_per_cta * plan.result_pitch;
}

// Scratch memory of a call. A row of a piece is head_size sums, their maximum and the sum of their
// weights; the rows of all heads of a CTA lie one after the other, plan.result_pitch floats apart.
struct PieceStore {
  float* rows;        // [slots, columns, cell_rows, result_pitch]
  unsigned* arrived;  // [2, slots, columns], 0 before and after every call
  int64_t num_cells;  // slots * columns, however the batch is cut
};

// How many pieces meet in the first of two steps; all, if one step does. No step has more pieces
// than result_rows.
__device__ inline int32_t fan_in(const DecodePlan& plan, const Piece& piece, int32_t num_rows) {
  constexpr int kOneStep = 160;  // rows
  if (piece.count * num_rows <= min(kOneStep, plan.result_rows)) return piece.count;
  return max(static_cast<int32_t>(ceilf(sqrtf(static_cast<float>(piece.count)))), 4);
}

// Shared memory in which pieces are added up.
struct MergeRoom {
  float* rows;
  int num_rows;  // result_rows at least
};

// What one CTA is to compute, apart from the keys.
struct CtaRows {
  int32_t column;
  int32_t first_head;
  int32_t first_row;

  __device__ static CtaRows of(const DecodePlan& plan, int column) {
    if (plan.row_chunks == 1) return {column, column * plan.heads(), 0};
    return {column, column / plan.row_chunks * plan.heads(),
            column % plan.row_chunks * plan.rows_per_cta};
  }

  __device__ RowBlock block(const DecodePlan& plan, const Span& span, int head) const {
    const int rows = min(plan.rows_per_cta, span.query_len * plan.group_size - first_row);
    return {span.first_token, span.query_len, span.seq_len, first_head + head, first_row, rows};
  }
};

// The piece that a CTA is at, in shared memory.
struct OpenPiece {
  Piece piece;
  int32_t fan;   // how many meet in the first step
  bool is_last;  // of the CTAs that arrive
};

// What a CTA does at the ends of a piece. All of it is inlined: a function that is called would
// have to load the parameters from memory, where these loads wait behind those of keys and values.
struct PieceEnd {
  const AttentionParams& params;
  const DecodePlan& plan;
  const PieceStore& store;
  OpenPiece& open;
  CtaRows cta;

  // By one thread, while the first tile is on its way: at the end the result would wait for it.
  __device__ __forceinline__ void begin(const Share& share, const Tile& tile) const {
    open.piece = Piece::of(plan, share, tile);
    open.fan = fan_in(plan, open.piece, rows_of(tile.span));
  }

  // The rows of the CTA's warps have been put into shared memory, one after the other. Warps that
  // share a head are added up in their order, and the pieces of a sequence by the last CTA that has
  // one, for which there is `room`.
  __device__ __forceinline__ void finish(const Tile& tile, const float* results,
                                         const MergeRoom& room) const {
    const Piece piece = open.piece;
    const bool is_cut = piece.count > 1;
    const int parts = static_cast<int>(blockDim.x / kWarpSize) >> plan.heads_log2;
    __syncthreads();  // all have put their rows
    add_up(is_cut ? rows_in(piece.slot(piece.index)) : nullptr, tile.span, results, parts, 0,
           rows_of(tile.span));
    if (is_cut) merge(piece, tile.span, room);
  }

 private:
  // The CTA's place in a slot.
  __device__ int64_t cell(int32_t slot) const {
    return static_cast<int64_t>(slot) * plan.num_columns + cta.column;
  }
  __device__ float* rows_in(int32_t slot) const {
    return store.rows + cell(slot) * floats_of_cell(plan);
  }

  // Of all heads of the CTA.
  __device__ int rows_of(const Span& span) const {
    return plan.heads() * cta.block(plan, span, 0).num_rows;
  }

  // Adds up the pieces first .. end-1, `step` apart, if this CTA is the last to store one of them:
  // those of a group, and then, by the last of the groups' CTAs, the first of each group, where the
  // sums of the group are then.
  __device__ __forceinline__ void merge(const Piece& piece, const Span& span,
                                        const MergeRoom& room) const {
    const int fan = open.fan;
    int first = quotient(piece.index, fan) * fan, end = min(first + fan, piece.count), step = 1;
    int expected = end - first;
    unsigned* arrived = store.arrived + cell(piece.slot(first));
#pragma unroll 1
    for (;;) {
      __syncthreads();  // all have stored their rows, and none reads shared memory any more
      if (threadIdx.x == 0) {
        // The pieces of one share come in their order.
        open.is_last =
            piece.in_one_share ? piece.index + 1 == end : last_to_arrive(arrived, expected);
      }
      __syncthreads();
      if (!open.is_last) return;
      const bool all = end - first == piece.count;
      float* const to = all ? nullptr : rows_in(piece.slot(first));
      merge_pieces(to, piece, span, first, end, step, room);
      if (all) return;
      first = 0, end = piece.count, step = fan;
      expected = quotient(piece.count + fan - 1, fan);
      arrived = store.arrived + store.num_cells + cell(piece.slot(0));
    }
  }

  // Fetches as many rows of all pieces at once as there is room for, and adds them up.
  __device__ __forceinline__ void merge_pieces(float* to, const Piece& piece, const Span& span,
                                               int first, int end, int step,
                                               const MergeRoom& room) const {
    const int parts = quotient(end - first + step - 1, step);
    const int all_rows = rows_of(span), most_rows = min(all_rows, quotient(room.num_rows, parts));
    const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int row = 0; row < all_rows; row += most_rows) {
      const int num_rows = min(most_rows, all_rows - row);
      const int stride = num_rows * plan.result_pitch;
      if (row > 0) __syncthreads();  // the rows before have been read
#pragma unroll 1
      for (int part = warp; part < parts; part += warps) {
        const int32_t slot = piece.slot(first + part * step);
        const float* const from = rows_in(slot) + row * plan.result_pitch;
        const SharedAddress at = shared_address(room.rows + part * stride);
#pragma unroll 4
        for (int i = lane * 4; i < stride; i += kWarpSize * 4) {
          copy_async_16(at + i * 4, from + i, true);
        }
      }
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      add_up(to, span, room.rows, parts, row, num_rows);
    }
  }

  // Adds up rows, so many `parts` of each, [parts, num_rows, result_pitch] floats in shared memory.
  // The results are the rows `first_row` and on: of `to` or, without it, of the output. A row has 8
  // lanes of a warp, or more where a sequence has few rows: the order of the sums does not depend
  // on how many of them there was room for.
  __device__ __forceinline__ void add_up(float* to, const Span& span, const float* parts,
                                         int num_parts, int first_row, int num_rows) const {
    const int threads = blockDim.x, lane = threadIdx.x % kWarpSize;
    int lanes_log2 = 5;
    while (lanes_log2 > 3 && threads >> lanes_log2 < rows_of(span)) --lanes_log2;
    const int lanes = 1 << lanes_log2;
    const int pitch = plan.result_pitch, at_softmax = pitch - 4, stride = num_rows * pitch;
    const int mine = lane & (lanes - 1);
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x - lane) >> lanes_log2; first < num_rows;
         first += threads >> lanes_log2) {
      const int row = min(first + (lane >> lanes_log2), num_rows - 1);  // the last one by several
      const float* const from = parts + row * pitch;
      const float2 softmax = add_up_softmax(from + at_softmax, num_parts, stride, lanes);
      const float base = base_of(softmax.x);
      const RowOutput output =
          to == nullptr ? output_of(span, first_row + row, softmax) : RowOutput{};
      float* const row_of_part = to + (first_row + row) * pitch;
#pragma unroll 1
      for (int column = mine * 4; column < at_softmax; column += lanes * 4) {
        float4 sums{};
#pragma unroll 4
        for (int part = 0; part < num_parts; ++part) {
          const float* const of_part = from + part * stride;
          const float weight = exp2_approx(of_part[at_softmax] - base);
          const float4 values = *reinterpret_cast<const float4*>(of_part + column);
          sums.x += weight * values.x, sums.y += weight * values.y;
          sums.z += weight * values.z, sums.w += weight * values.w;
        }
        if (to != nullptr) {
          *reinterpret_cast<float4*>(row_of_part + column) = sums;
        } else if (column < params.head_size) {
          write(output, column, sums);
        }
      }
      if (mine > 0) continue;
      if (to != nullptr) {
        store_pair(row_of_part + at_softmax, softmax.x, softmax.y);
      } else if (params.lse != nullptr) {
        params.lse[output.lse_index] = output.lse;
      }
    }
  }

  // The maximum of the parts' maxima, and the sum of their weights from there, by the `lanes` of a
  // row together.
  __device__ __forceinline__ float2 add_up_softmax(const float* softmaxes, int num_parts,
                                                   int stride, int lanes) const {
    const int mine = threadIdx.x & (lanes - 1);
    float maximum = -INFINITY, sum = 0.0f;
#pragma unroll 1
    for (int part = mine; part < num_parts; part += lanes) {
      maximum = fmaxf(maximum, softmaxes[part * stride]);
    }
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
    }
    const float base = base_of(maximum);
#pragma unroll 1
    for (int part = mine; part < num_parts; part += lanes) {
      const float* const softmax = softmaxes + part * stride;
      sum += exp2_approx(softmax[0] - base) * softmax[1];
    }
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    return {maximum, sum};
  }

  // `row`: among those of all heads of the CTA.
  __device__ __forceinline__ RowOutput output_of(const Span& span, int row,
                                                 const float2& softmax) const {
    const int of_head = cta.block(plan, span, 0).num_rows;
    const int head = quotient(row, of_head);
    return RowOutput::of(params, cta.block(plan, span, head), row - head * of_head, softmax.x,
                         softmax.y);
  }

  // Writes four columns of a row.
  __device__ __forceinline__ void write(const RowOutput& output, int column,
                                        const float4& sums) const {
    with_float_type(params.out_dtype, [&](auto type) {
      auto* const out = static_cast<decltype(type)*>(params.out);
      output.store(out, column, sums.x, sums.y);
      output.store(out, column + 2, sums.z, sums.w);
    });
  }
};

}  // namespace paged_ops::cuda
