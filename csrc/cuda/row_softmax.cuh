// The running softmax of softmax.cuh for the rows of the matrix units: kTiles times 16 queries, of
// which lane l holds the rows l / 4 and l / 4 + 8 of each tile, together with 3 other lanes.
#pragma once

#include "ptx.cuh"
#include "softmax.cuh"
#include "warp.cuh"

namespace paged_ops::cuda {

template <int kTiles, int kHeadSize>
struct RowSoftmax {
  float maximum[kTiles][2];  // of the logits, in base 2; -inf: no key seen
  float sum[kTiles][2];      // of exp2(logit - maximum); this lane's share until `finish`
  float out[kTiles][kHeadSize / 8][4];

  __device__ void reset() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[tile][half] = -INFINITY;
        sum[tile][half] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[tile][n][i] = 0.0f;
      }
    }
  }

  // Turns the logits of the next keys into weights and makes room for them in the state. `out` is
  // left alone where no maximum has risen, which soon is nearly always.
  template <int kActive, int kKeys>
  __device__ void weigh(float (&scores)[kTiles][kKeys / 8][4]) {
#pragma unroll
    for (int tile = 0; tile < kActive; ++tile) {
      float shrink[2];
      bool raised = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = maximum[tile][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const auto& score = scores[tile][n];
          largest = fmaxf(largest, fmaxf(score[2 * half], score[2 * half + 1]));
        }
        largest = quad_max(largest);
        const float base = base_of(largest);
        shrink[half] = exp2_approx(maximum[tile][half] - base);
        raised = raised || largest != maximum[tile][half];
        maximum[tile][half] = largest;
        float weights = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[tile][n][i] = exp2_approx(scores[tile][n][i] - base);
            weights += scores[tile][n][i];
          }
        }
        sum[tile][half] = sum[tile][half] * shrink[half] + weights;
      }
      if (warp_any(raised)) rescale(tile, shrink);
    }
  }

  __device__ void rescale(int tile, const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[tile][n][i] *= factor[i / 2];
    }
  }

  // The sums over the lanes that share a row.
  __device__ void finish() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[tile][half] = quad_sum(sum[tile][half]);
    }
  }
};

}  // namespace paged_ops::cuda
