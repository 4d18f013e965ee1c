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
  return plan.heads * plan.rows_per_cta * plan.result_pitch;
}

// Scratch memory of a call. A row of a piece is head_size sums, their maximum and the sum of their
// weights; the rows of all heads of a CTA lie one after the other, plan.result_pitch floats apart.
struct PieceStore {
  float* rows;        // [slots, columns, cell_rows, result_pitch]
  unsigned* arrived;  // [2, slots, columns], 0 before and after every call
  int64_t num_cells;  // slots * columns

  __device__ int64_t cell(const DecodePlan& plan, int32_t slot) const {
    return static_cast<int64_t>(slot) * plan.num_columns +
           static_cast<int32_t>(blockIdx.x) % plan.num_columns;
  }
  __device__ float* rows_of(const DecodePlan& plan, int32_t slot) const {
    return rows + cell(plan, slot) * floats_of_cell(plan);
  }
};

// A sequence of which a CTA has stored a piece and not yet told the others: that waits for all that
// is on its way to memory, so it is put off until the end of the share.
struct CutSequence {
  Piece piece;  // this CTA's
  Span span;
  bool is_last;  // to arrive
};

struct CutSequences {
  static constexpr int kCapacity = 2;  // the first and the last of a share
  int count;
  CutSequence cut[kCapacity];

  __device__ bool full() const { return count == kCapacity; }
};

// How many pieces meet in the first of two steps; all, if one step does.
__device__ inline int32_t fan_in(const Piece& piece, int32_t num_rows) {
  constexpr int kOneStep = 160;  // rows
  if (piece.count * num_rows <= kOneStep) return piece.count;
  return max(static_cast<int32_t>(ceilf(sqrtf(static_cast<float>(piece.count)))), 4);
}

// What one CTA is to compute, apart from the keys.
struct CtaRows {
  int32_t first_head;
  int32_t first_row;

  __device__ static CtaRows of(const DecodePlan& plan, int column) {
    return {column / plan.row_chunks * plan.heads, column % plan.row_chunks * plan.rows_per_cta};
  }

  __device__ RowBlock block(const DecodePlan& plan, const Span& span, int head) const {
    const int rows = min(plan.rows_per_cta, span.query_len * plan.group_size - first_row);
    return {span.first_token, span.query_len, span.seq_len, first_head + head, first_row, rows};
  }
};

// What a CTA does at the end of a piece. All of it is inlined: a function that is called would have
// to load the parameters from memory, where these loads wait behind those of keys and values.
struct PieceEnd {
  const AttentionParams& params;
  const DecodePlan& plan;
  const PieceStore& store;
  CutSequences& cut;
  CtaRows cta;

  // The rows of the CTA's warps have been put into shared memory, one after the other. Warps that
  // share a head are added up in their order.
  __device__ __forceinline__ void finish(const Share& share, const Tile& tile,
                                         float* results) const {
    const Piece piece = Piece::of(plan, share, tile);
    const int num_rows = rows_of(tile.span);
    const int parts = static_cast<int>(blockDim.x / kWarpSize) >> plan.heads_log2;
    __syncthreads();  // all have put their rows
    add_up(piece.count == 1 ? nullptr : store.rows_of(plan, piece.slot(piece.index)), tile.span,
           results, parts, 0, num_rows);
    if (piece.count == 1) return;
    if (threadIdx.x == 0) cut.cut[cut.count++] = {piece, tile.span, false};
    __syncthreads();
  }

  // Tells the others of the pieces that have been stored, and puts sequences together of which
  // these are the last. `room`: for result_rows rows in shared memory.
  __device__ __forceinline__ void merge(float* room) const {
    __syncthreads();  // all have stored their rows, and nothing is read from `room` any more
    if (static_cast<int>(threadIdx.x) < cut.count) {
      CutSequence& mine = cut.cut[threadIdx.x];
      const int fan = fan_in(mine.piece, rows_of(mine.span));
      const int group = quotient(mine.piece.index, fan) * fan;
      mine.is_last = last_to_arrive(store.arrived + store.cell(plan, mine.piece.slot(group)),
                                    min(fan, mine.piece.count - group));
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < cut.count; ++i) {
      if (cut.cut[i].is_last) merge_sequence(cut.cut[i], room);
    }
    __syncthreads();
    if (threadIdx.x == 0) cut.count = 0;
    __syncthreads();
  }

 private:
  // Of all heads of the CTA.
  __device__ int rows_of(const Span& span) const {
    return plan.heads * cta.block(plan, span, 0).num_rows;
  }

  __device__ __forceinline__ void merge_sequence(CutSequence& sequence, float* room) const {
    const Piece& piece = sequence.piece;
    const int fan = fan_in(piece, rows_of(sequence.span));
    // The pieces first .. end-1, `step` apart: those of a group, then, by the last of the groups'
    // CTAs, the first of each group, where the sums of the group are then.
    int first = quotient(piece.index, fan) * fan, end = min(first + fan, piece.count), step = 1;
#pragma unroll 1
    for (;;) {
      const bool all = end - first == piece.count;
      float* const to = all ? nullptr : store.rows_of(plan, piece.slot(first));
      merge_pieces(to, sequence, first, end, step, room);
      if (all) return;
      __syncthreads();
      if (threadIdx.x == 0) {
        sequence.is_last =
            last_to_arrive(store.arrived + store.num_cells + store.cell(plan, piece.slot(0)),
                           quotient(piece.count + fan - 1, fan));
      }
      __syncthreads();
      if (!sequence.is_last) return;
      first = 0, end = piece.count, step = fan;
    }
  }

  // Fetches as many rows of as many pieces as there is room for, and adds them up; of more pieces
  // the sums of the first ones take the place of one.
  __device__ __forceinline__ void merge_pieces(float* to, const CutSequence& sequence, int first,
                                               int end, int step, float* room) const {
    const int all_rows = rows_of(sequence.span);
    const int most_rows = min(all_rows, plan.result_rows / 2);
    const int most_parts = quotient(plan.result_rows, most_rows);
    const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int row = 0; row < all_rows; row += most_rows) {
      const int num_rows = min(most_rows, all_rows - row);
      const int stride = num_rows * plan.result_pitch;
#pragma unroll 1
      for (int piece = first; piece < end;) {
        const int kept = piece == first ? 0 : 1;
        const int parts = min(most_parts, kept + quotient(end - piece + step - 1, step));
        __syncthreads();  // `room` is not read any more, and has the sums
#pragma unroll 1
        for (int part = kept + warp; part < parts; part += warps) {
          const int32_t slot = sequence.piece.slot(piece + (part - kept) * step);
          const float* const from = store.rows_of(plan, slot) + row * plan.result_pitch;
          const SharedAddress at = shared_address(room + part * stride);
#pragma unroll 4
          for (int i = lane * 4; i < stride; i += kWarpSize * 4) {
            copy_async_16(at + i * 4, from + i, true);
          }
        }
        piece += (parts - kept) * step;
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        const bool in_part = piece < end;
        add_up(in_part ? room : to, sequence.span, room, parts, in_part ? 0 : row, num_rows);
      }
    }
  }

  // Adds up rows, so many `parts` of each, [parts, num_rows, result_pitch] floats in shared memory.
  // The results are the rows `first_row` and on: of `to` or, without it, of the output. A row has 8
  // lanes of a warp, or more where there are few rows.
  __device__ __forceinline__ void add_up(float* to, const Span& span, const float* parts,
                                         int num_parts, int first_row, int num_rows) const {
    const int threads = blockDim.x, lane = threadIdx.x % kWarpSize;
    int lanes = kWarpSize;
    while (lanes > 8 && threads / lanes < num_rows) lanes /= 2;
    const int pitch = plan.result_pitch, at_softmax = pitch - 4, stride = num_rows * pitch;
    const int mine = lane & (lanes - 1);
#pragma unroll 1
    for (int first = (threadIdx.x - lane) / lanes; first < num_rows; first += threads / lanes) {
      const int row = min(first + lane / lanes, num_rows - 1);  // the last one by several
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
      __syncwarp();  // `to` may be where the first part is
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
