// Putting the pieces of a sequence together: the last CTA to arrive adds them up in their order, so
// the result does not depend on who that is. Many pieces meet in two steps, first some of them and
// then what these give, since one CTA alone would read for longer than it took to make them.
#pragma once

#include <cstdint>

#include "../params.h"
#include "row_output.cuh"
#include "schedule.cuh"
#include "softmax.cuh"

namespace paged_ops::cuda {

// Scratch memory of a call. A piece is what a CTA knows of its rows: [rows, head_size] sums, then
// for each row its maximum and its sum.
struct PieceStore {
  float* sums;        // [slots, columns, rows, head_size]
  float2* softmaxes;  // [slots, columns, rows] maximum and sum
  float2* merged;     // the same of what the first step gives, where its first piece was
  unsigned* arrived;  // [2, slots, columns], 0 before and after every call

  // Bytes of the first three for `cells` = slots * columns.
  static size_t bytes(int64_t cells, int64_t rows, int64_t head_size) {
    return cells * rows * (head_size * sizeof(float) + 2 * sizeof(float2));
  }

  static PieceStore over(void* memory, unsigned* arrived, int64_t cells, int64_t rows,
                         int64_t head_size) {
    auto* const sums = static_cast<float*>(memory);
    auto* const softmaxes = reinterpret_cast<float2*>(sums + cells * rows * head_size);
    return {sums, softmaxes, softmaxes + cells * rows, arrived};
  }
};

// A sequence of which a CTA has stored a piece.
struct CutSequence {
  Piece piece;       // this CTA's
  int32_t num_rows;  // of each head
  Span span;
};

// Adds up the pieces of sequences. Rows go to the warps of the CTA in turn; a warp's lanes have
// four columns each.
class PieceMerger {
 public:
  __device__ PieceMerger(const AttentionParams& params, const DecodePlan& plan,
                         const PieceStore& store)
      : store_(store),
        num_cells_(num_cells(params, plan)),
        num_columns_(plan.num_columns),
        column_(static_cast<int32_t>(blockIdx.x) % plan.num_columns),
        heads_(plan.heads),
        rows_per_head_(plan.rows_per_cta),
        head_size_(params.head_size) {}

  // The first of a head's rows in the store.
  __device__ int64_t rows_of(int32_t slot, int32_t head) const {
    return (cell(slot) * heads_ + head) * rows_per_head_;
  }

  // To be called by all CTAs that have stored a piece of the sequence: true in all threads of the
  // last, which then hands the result to `run(head, row, d, sums, softmax)` by `finish`.
  __device__ bool is_last(const CutSequence& cut) const {
    const int fan = fan_in(cut);
    const int group = cut.piece.index / fan * fan;
    const int group_size = min(fan, cut.piece.count - group);
    const int32_t first = cut.piece.slot(group);
    if (!last_to_arrive(store_.arrived + cell(first), group_size)) return false;
    if (cut.piece.count <= fan) return true;
    add_up(cut, store_.softmaxes, group, 1, group_size,
           [&](int head, int row, int d, const float4& sums, const float2& softmax) {
             const int64_t index = rows_of(first, head) + row;
             *reinterpret_cast<float4*>(store_.sums + index * head_size_ + d) = sums;
             if (d == 0) store_.merged[index] = softmax;
           });
    const int groups = (cut.piece.count + fan - 1) / fan;
    return last_to_arrive(store_.arrived + num_cells_ + cell(cut.piece.slot(0)), groups);
  }

  template <typename Run>
  __device__ void finish(const CutSequence& cut, Run&& run) const {
    const int fan = fan_in(cut);
    const int groups = (cut.piece.count + fan - 1) / fan;
    if (groups == 1) return add_up(cut, store_.softmaxes, 0, 1, cut.piece.count, run);
    add_up(cut, store_.merged, 0, fan, groups, run);
  }

 private:
  __device__ int64_t cell(int32_t slot) const {
    return static_cast<int64_t>(slot) * num_columns_ + column_;
  }

  // How many pieces meet in the first of two steps; all, if one step does.
  __device__ int32_t fan_in(const CutSequence& cut) const {
    constexpr int kOneStep = 40;  // pieces of four rows
    if (cut.piece.count * heads_ * cut.num_rows <= kOneStep * 4) return cut.piece.count;
    return max(static_cast<int32_t>(ceilf(sqrtf(static_cast<float>(cut.piece.count)))), 4);
  }

  // True in all threads of the last of `count` CTAs that call it. What they have written before is
  // there to be read (past L1) after.
  __device__ static bool last_to_arrive(unsigned* arrived, int count) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(arrived, 1u) + 1 == static_cast<unsigned>(count);
      if (last) {
        *arrived = 0;  // as it was found
        __threadfence();
      }
    }
    __syncthreads();
    return last;
  }

  template <typename Run>
  __device__ void add_up(const CutSequence& cut, const float2* softmaxes, int from, int step,
                         int count, Run&& run) const {
    const int warps = blockDim.x / kWarpSize;
    const int rows = heads_ * cut.num_rows;
    for (int i = threadIdx.x / kWarpSize; i < rows; i += warps) {
      add_up_row(cut.piece, softmaxes, from, step, count, i / cut.num_rows, i % cut.num_rows, run);
    }
  }

  // Lane k has the weight of part k, and of part k + 32, ...
  template <typename Run>
  __device__ void add_up_row(const Piece& piece, const float2* softmaxes, int from, int step,
                             int count, int head, int row, Run&& run) const {
    constexpr int kInFlight = 12;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t stride =
        rows_of(piece.slot(from + 2 * step), 0) - rows_of(piece.slot(from + step), 0);
    const int64_t first = rows_of(piece.slot(from), head) + row;
    const int64_t second = rows_of(piece.slot(from + step), head) + row;
    const auto row_of = [&](int part) { return part == 0 ? first : second + (part - 1) * stride; };
    float maximum = -INFINITY, sum = 0.0f;
    for (int d = lane * 4; d - lane * 4 < head_size_; d += kWarpSize * 4) {
      float4 out{};
      maximum = -INFINITY;
      sum = 0.0f;
      for (int batch = 0; batch < count; batch += kWarpSize) {
        const int part = min(batch + lane, count - 1);
        const float2 softmax = __ldcg(softmaxes + row_of(part));
        const float mine = batch + lane < count ? softmax.x : -INFINITY;
        const float raised = fmaxf(maximum, warp_max(mine));
        const float base = base_of(raised);
        const float weight = exp2_approx(mine - base);
        const float shrink = exp2_approx(maximum - base);
        maximum = raised;
        sum = sum * shrink + warp_sum(weight * softmax.y);
        out.x *= shrink, out.y *= shrink, out.z *= shrink, out.w *= shrink;
        const int end = min(kWarpSize, count - batch);
        for (int k = 0; k < end; k += kInFlight) {
          float4 parts[kInFlight];
#pragma unroll
          for (int j = 0; j < kInFlight; ++j) {
            const float* const from_row =
                store_.sums + row_of(batch + min(k + j, end - 1)) * head_size_;
            if (d < head_size_) parts[j] = __ldcg(reinterpret_cast<const float4*>(from_row + d));
          }
#pragma unroll
          for (int j = 0; j < kInFlight; ++j) {
            const float of_part = warp_broadcast(weight, min(k + j, end - 1));
            const float factor = k + j < end ? of_part : 0.0f;
            out.x += factor * parts[j].x;
            out.y += factor * parts[j].y;
            out.z += factor * parts[j].z;
            out.w += factor * parts[j].w;
          }
        }
      }
      if (d < head_size_) run(head, row, d, out, float2{maximum, sum});
    }
  }

  const PieceStore& store_;
  int64_t num_cells_;
  int32_t num_columns_;
  int32_t column_;
  int32_t heads_;
  int32_t rows_per_head_;  // room for them
  int32_t head_size_;
};

}  // namespace paged_ops::cuda
