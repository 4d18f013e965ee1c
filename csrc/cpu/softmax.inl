// Scores to weights, a row at a time, in base 2: weight = 2^(score - max), with the running maximum
// and sum of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

namespace paged_ops::cpu {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

inline Vec polynomial(Vec x, const float* coefficients, int degree) {
  Vec sum = broadcast(coefficients[degree]);
  for (int i = degree - 1; i >= 0; --i) sum = multiply_add(sum, x, broadcast(coefficients[i]));
  return sum;
}

// 2^x for x <= 127, relative error 1.1e-7; 0 for x = -inf, NaN for NaN.
inline Vec exp2(Vec x) {
  // Least maximum error on [-1/2, 1/2] among those that are exact at 0.
  constexpr float kCoefficients[] = {1.0f,          0.693147004f,   0.240222424f,
                                     0.0555073358f, 0.00967151299f, 0.00132647238f};
  x = max(broadcast(kLeastExponent), x);
  const Vec whole = round(x);
  return times_power_of_two(polynomial(sub(x, whole), kCoefficients, 5), whole);
}

// Near 0, where (1 - e^-2|x|) / (1 + e^-2|x|) would cancel, the series.
inline Vec tanh(Vec x) {
  constexpr float kSeries[] = {1.0f, -1.0f / 3, 2.0f / 15, -17.0f / 315, 62.0f / 2835};
  const Vec one = broadcast(1.0f), magnitude = abs(x), square = mul(x, x);
  const Vec decay = exp2(mul(magnitude, broadcast(-2 * kLog2E)));
  const Vec far = copy_sign(div(sub(one, decay), add(one, decay)), x);
  const Vec near = mul(x, polynomial(square, kSeries, 4));
  return select_less(magnitude, broadcast(0.3f), near, far);
}

// From q . k to a score times log2(e), for one KV head.
struct Scoring {
  float scale;    // of q . k; with softcap, the argument of tanh
  float softcap;  // times log2(e); 0: none
};

inline Scoring make_scoring(const AttentionParams& params, int kv_head) {
  const Scale& k_scale = params.k_scale;
  const float scale =
      params.scale * (k_scale.data == nullptr ? 1.0f : k_scale.data[kv_head * k_scale.stride]);
  if (params.softcap > 0) return {scale / params.softcap, params.softcap * kLog2E};
  return {scale * kLog2E, 0};
}

// What one row of a tile needs to know.
struct Row {
  KeyRange seen;           // of the tile's keys
  float slope;             // ALiBi, times log2(e)
  int64_t query_distance;  // the query's position less the tile's first key
};

struct RunningSoftmax {
  float max;  // of the scores, base 2; -inf before the first
  float sum;  // of the weights
};

inline Vec score(Vec product, const Scoring& scoring, const Row& row, int key) {
  Vec x = mul(product, broadcast(scoring.scale));
  if (scoring.softcap > 0) x = mul(tanh(x), broadcast(scoring.softcap));
  if (row.slope != 0) {
    const Vec distance = sub(iota(), broadcast(static_cast<float>(row.query_distance - key)));
    x = multiply_add(abs(distance), broadcast(-row.slope), x);
  }
  const int begin = static_cast<int>(row.seen.begin) - key;
  const int end = static_cast<int>(row.seen.end) - key;
  return begin <= 0 && end >= kLanes ? x : select(begin, end, x, broadcast(-kInfinity));
}

// Whether scores of a tile are q . k times a factor and no more: that can wait for the exponential.
inline bool only_scaled(const Scoring& scoring, const Row& row, int num_keys) {
  return scoring.softcap == 0 && scoring.scale > 0 && row.slope == 0 && row.seen.begin == 0 &&
         row.seen.end == num_keys;
}

// Turns num_vectors vectors of q . k into weights, 0 where the row does not see the key, and
// returns the factor by which what was summed before has to shrink.
template <typename Math>
float softmax_row(const Scoring& scoring, const Row& row, float* scores, int num_vectors,
                  typename Math::Element* weights, RunningSoftmax& running, Ahead& ahead) {
  const bool scaled = only_scaled(scoring, row, num_vectors * kLanes);
  Vec best = broadcast(-kInfinity);
  for (int i = 0; i < num_vectors; ++i) {
    Vec x = load(scores + i * kLanes);
    if (!scaled) {
      x = score(x, scoring, row, i * kLanes);
      store(scores + i * kLanes, x);
    }
    best = max(best, x);
  }
  const float factor = scaled ? scoring.scale : 1.0f;
  const float tile_max = reduce_max(best) * factor;
  const float new_max = tile_max > running.max ? tile_max : running.max;
  // A row that has seen nothing yet: -inf - 0, where -inf - -inf would be NaN.
  const float reference = new_max == -kInfinity ? 0.0f : new_max;
  Vec sum = zero();
  for (int i = 0; i < num_vectors; ++i) {
    const Vec weight =
        exp2(multiply_add(load(scores + i * kLanes), broadcast(factor), broadcast(-reference)));
    sum = add(sum, weight);
    ahead.fetch();
    Math::store_weights(weights + i * kLanes, weight);
  }
  const float rescale = running.max == new_max ? 1.0f : std::exp2(running.max - reference);
  running = {new_max, running.sum * rescale + reduce_add(sum)};
  return rescale;
}

}  // namespace
}  // namespace paged_ops::cpu
