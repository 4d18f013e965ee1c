// Attention over a paged cache, one unit of the schedule at a time: its query rows are kept beside
// their running softmax while the tiles of keys go by (FlashAttention, Dao et al. 2022).

#include "attend_tile.inl"

namespace paged_ops::cpu {
namespace {

// out = factor * sums, of the type that the caller wants. A factor of 0 writes zeros, whatever sums
// holds.
void write_out(const AttentionParams& params, int64_t token, int64_t head, const float* sums,
               float factor) {
  with_float_type(params.out_dtype, [&](auto type) {
    using Out = decltype(type);
    Out* const out = static_cast<Out*>(params.out) + token * params.out_stride_token +
                     head * params.out_stride_head;
    for (int d = 0; d < params.head_size; d += kLanes) {
      const Vec x = factor == 0 ? zero() : mul(load(sums + d), broadcast(factor));
      store(out + d, x, params.head_size - d);
    }
  });
}

void write_lse(const AttentionParams& params, int64_t token, int64_t head, float lse) {
  if (params.lse != nullptr) params.lse[token * params.num_heads + head] = lse;
}

void write_unseeing_row(const AttentionParams& params, int64_t token, int64_t head) {
  write_out(params, token, head, nullptr, 0.0f);
  write_lse(params, token, head, -kInfinity);
}

// Normalises one finished row. The sink joins here, once, as a score without a value. Where every
// score is -inf the sum is 0, and the row is as one that sees no key.
void write_row(const AttentionParams& params, int64_t token, int64_t head, const float* sums,
               RunningSoftmax total) {
  float shrink = 1.0f;
  if (params.sinks != nullptr) {
    const float sink = params.sinks[head] * kLog2E;
    const float max = total.max > sink ? total.max : sink;  // NaN if the sink is
    if (max != -kInfinity) {
      shrink = std::exp2(total.max - max);
      total = {max, total.sum * shrink + std::exp2(sink - max)};
    }
  }
  const Scale& v_scale = params.v_scale;
  const int64_t kv_head = head / params.group_size();
  const float dequantise = v_scale.data == nullptr ? 1.0f : v_scale.data[kv_head * v_scale.stride];
  write_out(params, token, head, sums, total.sum == 0 ? 0.0f : shrink * dequantise / total.sum);
  write_lse(params, token, head, (total.max + std::log2(total.sum)) * kLn2);
}

void store_partial(const AttentionParams& params, const Partials& partials, int64_t index,
                   const float* sums, RunningSoftmax running) {
  const int64_t width = padded_head_size(params.head_size);
  partials.max[index] = running.max;
  partials.sum[index] = running.sum;
  for (int64_t d = 0; d < width; d += kLanes) {
    store(partials.out + index * width + d, load(sums + d));
  }
}

template <typename Element>
void finish(const AttentionParams& params, const Schedule& schedule, const Unit& unit,
            const Workspace<Element>& space) {
  const int64_t group_size = params.group_size();
  for (int64_t kv_head = 0; kv_head < unit.num_kv_heads; ++kv_head) {
    for (int64_t i = 0; i < space.num_rows; ++i) {
      const int64_t row = kv_head * space.head_rows + i;
      const int64_t in_unit = i / group_size, token = unit.first_token + in_unit;
      const int64_t head = (unit.first_kv_head + kv_head) * group_size + i % group_size;
      const float* const sums = space.out + row * space.out_stride;
      const KeyRange seen = visible_keys(params, unit.seq_len, unit.first_position + in_unit);
      if (unit.num_splits > 1) {
        const int64_t index =
            unit.first_partial + (in_unit * params.num_heads + head) * unit.num_splits;
        store_partial(params, schedule.partials(), index, sums, space.running[row]);
      } else if (seen.begin == seen.end) {
        write_unseeing_row(params, token, head);
      } else {
        write_row(params, token, head, sums, space.running[row]);
      }
    }
  }
}

// In the order of memory: by tokens where a token's heads lie together, else by heads.
template <typename T>
void plan_ahead(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                Ahead& ahead) {
  const auto add_half = [&](const T* const* rows, int64_t stride_head) {
    const bool together = stride_head == params.head_size;
    const int64_t size = (together ? unit.num_kv_heads : 1) * params.head_size * int64_t{sizeof(T)};
    for (int head = 0; head < (together ? 1 : unit.num_kv_heads); ++head) {
      for (int i = 0; i < tile.num_keys; ++i) {
        if (rows[i] != nullptr)
          ahead.add(rows[i] + (unit.first_kv_head + head) * stride_head, size);
      }
    }
  };
  add_half(tile.keys, params.key_cache.stride_head);
  add_half(tile.values, params.value_cache.stride_head);
}

template <typename Math, typename T>
void attend_unit(const AttentionParams& params, const Schedule& schedule, const Unit& unit) {
  const auto space = make_workspace<Math>(params, unit);
  const typename Math::Tiles registers(space.num_rows);
  start(params, unit, space);
  arrange_query(Math(), unit, space);
  // Tiles begin at multiples of their size, wherever the unit's keys do.
  int64_t key = unit.keys.begin / unit.tile_keys * unit.tile_keys;
  Tile<T> tiles[2];
  locate(params, unit, key, tiles[0]);
  if (unit.num_kv_heads > 1) {
    Ahead first;
    plan_ahead(params, unit, tiles[0], first);
    first.fetch_all();
  }
  for (int i = 0; key < unit.keys.end; i = 1 - i) {
    key += unit.tile_keys;
    locate(params, unit, key, tiles[1 - i]);
    Ahead ahead;
    if (unit.num_kv_heads > 1) {
      plan_ahead(params, unit, tiles[1 - i], ahead);
      ahead.start(num_steps(Math(), params, unit, static_cast<int>(space.num_rows)));
    }
    for (int kv_head = 0; kv_head < unit.num_kv_heads; ++kv_head) {
      attend_tile<Math>(params, unit, tiles[i], kv_head, space, ahead);
    }
  }
  finish(params, schedule, unit, space);
}

// Adds up the partial results of one row in the order of the splits.
RunningSoftmax merge_partials(const Partials& partials, int64_t first, int64_t num_splits,
                              int64_t width, float* sums) {
  float max = -kInfinity;
  for (int64_t i = first; i < first + num_splits; ++i) {
    if (partials.max[i] > max) max = partials.max[i];
  }
  const float reference = max == -kInfinity ? 0.0f : max;
  RunningSoftmax total{max, 0.0f};
  for (int64_t d = 0; d < width; d += kLanes) store(sums + d, zero());
  for (int64_t i = first; i < first + num_splits; ++i) {
    if (partials.max[i] == -kInfinity && partials.sum[i] == 0.0f) continue;  // saw nothing
    const float weight = std::exp2(partials.max[i] - reference);
    total.sum += weight * partials.sum[i];
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec part = load(partials.out + i * width + d);
      store(sums + d, multiply_add(broadcast(weight), part, load(sums + d)));
    }
  }
  return total;
}

void merge_sequence(const AttentionParams& params, const Schedule& schedule, int64_t seq) {
  const Cut cut = schedule.cut_sequence(seq);
  if (cut.num_splits == 1) return;
  const int64_t width = padded_head_size(params.head_size);
  float sums[padded_head_size(kMaxHeadSize)];
  int64_t first = schedule.first_partial(seq);
  for (int64_t i = 0; i < cut.query_len; ++i) {
    const int64_t token = cut.first_token + i;
    const KeyRange seen = visible_keys(params, cut.seq_len, cut.seq_len - cut.query_len + i);
    for (int64_t head = 0; head < params.num_heads; ++head, first += cut.num_splits) {
      if (seen.begin == seen.end) {
        write_unseeing_row(params, token, head);
      } else {
        const RunningSoftmax total =
            merge_partials(schedule.partials(), first, cut.num_splits, width, sums);
        write_row(params, token, head, sums, total);
      }
    }
  }
}

// Rows that no sequence owns: before the first and after the last.
void write_padding(const AttentionParams& params) {
  if (params.query_start_loc == nullptr) return;
  const int64_t begin = params.query_start_loc[0], end = params.query_start_loc[params.num_seqs];
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    if (token == begin) token = end;
    if (token >= params.num_tokens) break;
    for (int64_t head = 0; head < params.num_heads; ++head) {
      write_unseeing_row(params, token, head);
    }
  }
}

template <typename Math, typename T>
void attend_units(const AttentionParams& params, const Schedule& schedule) {
  for_each_unit(schedule.num_units(), schedule.max_threads(), [&](int64_t index) {
    const Unit unit = schedule.unit(index);
    if (unit.num_tokens * params.group_size() < Math::kLeastRows) {
      return attend_unit<typename Math::OfFewerRows, T>(params, schedule, unit);
    }
    attend_unit<Math, T>(params, schedule, unit);
  });
}

// MathOf<T>: the arithmetic for a cache of T. What it has for float8 may be bfloat16's, which does
// not hold a query of another type.
template <template <typename> class MathOf, const Blocking& kBlocking = kVectorBlocking>
void attention(const AttentionParams& params) {
  const Schedule schedule(params, kBlocking);
  with_cache_type(params.cache_dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, Float8E4M3>) {
      if (params.query_dtype != DType::kBFloat16) {
        return attend_units<Float32Math, T>(params, schedule);
      }
    }
    attend_units<typename MathOf<T>::type, T>(params, schedule);
  });
  if (schedule.has_splits()) {
    for_each_unit(params.num_seqs, schedule.max_threads(),
                  [&](int64_t seq) { merge_sequence(params, schedule, seq); });
  }
  write_padding(params);
}

}  // namespace
}  // namespace paged_ops::cpu
