// The online softmax (Milakov and Gimelshein, 2018) as FlashAttention uses it (Dao et al., 2022):
// attention over part of the keys as a state that takes in more keys and merges with other states.
//
// Logits are in base 2 (the natural ones times log2 e), because the hardware's exponential is.
#pragma once

#include "warp.cuh"

namespace paged_ops::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// What logits are measured from: their maximum, but 0 where that is -inf, since -inf - -inf would
// make the weight of nothing NaN.
__device__ inline float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// One query head's state in a warp. `maximum` and `sum` are the same in every lane; lane l holds
// the elements l, l + 32, ... of the head. A state that has seen no key is (-inf, 0, 0).
template <int kElements>
struct SoftmaxState {
  float maximum = -INFINITY;  // of the logits
  float sum = 0.0f;           // of exp2(logit - maximum)
  float out[kElements] = {};  // of exp2(logit - maximum) * value

  // Raises the maximum to at least `logit` and returns what the logits are measured from.
  __device__ float rebase(float logit) {
    const float raised = fmaxf(maximum, logit);
    const float base = base_of(raised);
    const float shrink = exp2f(maximum - base);
    maximum = raised;
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] *= shrink;
    return base;
  }

  // Takes in a tile of keys. A key that is not there has the logit -inf and the value 0.
  template <int kKeys>
  __device__ void update(const float (&logits)[kKeys], const float (&values)[kKeys][kElements]) {
    float largest = logits[0];
#pragma unroll
    for (int key = 1; key < kKeys; ++key) largest = fmaxf(largest, logits[key]);
    const float base = rebase(largest);
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const float weight = exp2f(logits[key] - base);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kElements; ++i) out[i] += weight * values[key][i];
    }
  }

  __device__ void merge(const SoftmaxState& other) {
    const float base = rebase(other.maximum);
    const float weight = exp2f(other.maximum - base);
    sum += weight * other.sum;
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] += weight * other.out[i];
  }

  // One more logit in the denominator, without a value.
  __device__ void add_sink(float logit) {
    const float base = rebase(logit);
    sum += exp2f(logit - base);
  }

  // What the elements of `out` are multiplied by in the end: 0 where there was no key.
  __device__ float normalizer() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }

  // The natural logarithm of the denominator: -inf where there was no key.
  __device__ float lse() const { return (maximum + log2f(sum)) * kLn2; }
};

}  // namespace paged_ops::cuda
