// The running softmax of softmax.cuh for the rows of the matrix units: kTiles times 16 queries, of
// which lane l holds the rows l / 4 and l / 4 + 8 of each tile, together with 3 other lanes.
#pragma once

#include "fragments.cuh"
#include "ptx.cuh"
#include "softmax.cuh"
#include "warp.cuh"

namespace paged_ops::cuda {

template <int kTiles, int kHeadSize>
struct RowSoftmax {
  // What the logits are measured from, in base 2: some logit that is smaller than the largest by
  // kSlack at most; -inf: no key seen.
  float base[kTiles][2];
  float sum[kTiles][2];  // of exp2(logit - base); this lane's share until `finish`
  float out[kTiles][kHeadSize / 8][4];

  __device__ void reset() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        base[tile][half] = -INFINITY;
        sum[tile][half] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[tile][n][i] = 0.0f;
      }
    }
  }

  // Raises the base where the logits of the next keys, scores times factor > 0, lie far above it:
  // after the first tiles that is rare (as in FlashAttention-4), and else nothing is rescaled and
  // the lanes need not agree on a maximum. True if it did: `out` is then to be rescaled by
  // `shrink` before anything is added to it.
  template <int kKeys>
  __device__ bool raise_base(const float (&scores)[kTiles][kKeys / 8][4], float factor,
                             float (&shrink)[kTiles][2]) {
    float largest[kTiles][2];
    bool far = false;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float score = scores[tile][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          score = fmaxf(score, fmaxf(scores[tile][n][2 * half], scores[tile][n][2 * half + 1]));
        }
        largest[tile][half] = score * factor;
        far = far || largest[tile][half] > base[tile][half] + kSlack;
      }
    }
    if (!warp_any(far)) return false;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = fmaxf(base[tile][half], quad_max(largest[tile][half]));
        shrink[tile][half] = exp2_approx(base[tile][half] - base_of(raised));
        base[tile][half] = raised;
        sum[tile][half] *= shrink[tile][half];
      }
    }
    return true;
  }

  __device__ void rescale(const float (&shrink)[kTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[tile][n][i] *= shrink[tile][i / 2];
      }
    }
  }

  // Both at once.
  template <int kKeys>
  __device__ void make_room(const float (&scores)[kTiles][kKeys / 8][4], float factor) {
    float shrink[kTiles][2];
    if (raise_base<kKeys>(scores, factor, shrink)) rescale(shrink);
  }

  // The weights of 16 keys, which begin at key 16 n: as what multiplies the values.
  template <typename Number, int kKeys>
  __device__ void weigh(const float (&scores)[kTiles][kKeys / 8][4], float factor, int tile, int n,
                        RowFragment& fragment) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const pair = &scores[tile][2 * n + part][2 * half];
        const float from = base_of(base[tile][half]);
        const float first = exp2_approx(fmaf(pair[0], factor, -from));
        const float second = exp2_approx(fmaf(pair[1], factor, -from));
        sum[tile][half] += first + second;
        fragment[2 * part + half] = pack(Number(), first, second);
      }
    }
  }

  // Weights in the place of the scores of all keys.
  template <int kKeys>
  __device__ void weigh_in_place(float (&scores)[kTiles][kKeys / 8][4], float factor) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float from = base_of(base[tile][half]);
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          float* const pair = &scores[tile][n][2 * half];
          pair[0] = exp2_approx(fmaf(pair[0], factor, -from));
          pair[1] = exp2_approx(fmaf(pair[1], factor, -from));
          added += pair[0] + pair[1];
        }
        sum[tile][half] += added;
      }
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

 private:
  // Weights up to 2^8: float16 holds 2^15, and what is smaller by 2^24 than the largest is lost.
  static constexpr float kSlack = 8.0f;
};

}  // namespace paged_ops::cuda
