// Attention over a paged cache, one unit of the schedule at a time: its query rows are kept beside
// their running softmax while the tiles of keys go by (FlashAttention, Dao et al. 2022), each tile
// gathered through the block table row by row, so that any block size and any strides will do.

#include "softmax.inl"
#include "tile.inl"

namespace paged_ops::cpu {
namespace {

// What a unit works with, in the thread's scratch memory. A row is a (token, query head of the
// group).
template <typename Element>
struct Workspace {
  int64_t num_rows;      // of one KV head
  int64_t query_stride;  // elements, whole words
  int64_t out_stride;
  Element* query;           // [num_kv_heads, num_rows, query_stride]
  float* out;               // [num_kv_heads, num_rows, out_stride], unnormalised
  RunningSoftmax* running;  // [num_kv_heads, num_rows]
  float* rescale;           // [num_rows]
  float* scores;            // [num_rows, kTileKeys]
  Element* weights;         // [num_rows, kTileKeys]
  float* packed;            // keys, then values
};

// Hands out aligned pieces; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void carve(T*& piece, int64_t count) {
    piece = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <typename Math>
int64_t carve_workspace(const AttentionParams& params, const Unit& unit, void* base,
                        Workspace<typename Math::Element>& space) {
  space.num_rows = unit.num_tokens * params.group_size();
  space.query_stride = round_up(params.head_size, Math::kDepth);
  space.out_stride = padded_head_size(params.head_size);
  const int64_t all_rows = space.num_rows * unit.num_kv_heads;
  Carver carver(base);
  carver.carve(space.query, all_rows * space.query_stride);
  carver.carve(space.out, all_rows * space.out_stride);
  carver.carve(space.running, all_rows);
  carver.carve(space.rescale, space.num_rows);
  carver.carve(space.scores, space.num_rows * kTileKeys);
  carver.carve(space.weights, space.num_rows * kTileKeys);
  carver.carve(space.packed, kTileKeys * space.out_stride);
  return carver.used();
}

template <typename Math>
Workspace<typename Math::Element> make_workspace(const AttentionParams& params, const Unit& unit) {
  Workspace<typename Math::Element> space;
  const int64_t bytes = carve_workspace<Math>(params, unit, nullptr, space);
  carve_workspace<Math>(params, unit, scratch(Scratch::kUnit, bytes), space);
  return space;
}

// The query rows, as the products want them, and empty running results.
template <typename Element>
void start(const AttentionParams& params, const Unit& unit, const Workspace<Element>& space) {
  const int64_t group_size = params.group_size();
  const int stride = static_cast<int>(space.query_stride);
  with_float_type(params.query_dtype, [&](auto type) {
    using Query = decltype(type);
    const Query* const query = static_cast<const Query*>(params.query);
    Element* row = space.query;
    for (int64_t kv_head = 0; kv_head < unit.num_kv_heads; ++kv_head) {
      for (int64_t i = 0; i < space.num_rows; ++i, row += stride) {
        const int64_t token = unit.first_token + i / group_size;
        const int64_t head = (unit.first_kv_head + kv_head) * group_size + i % group_size;
        const Query* const source =
            query + token * params.query_stride_token + head * params.query_stride_head;
        for (int d = 0; d < stride; d += kLanes) {
          store(row + d, load(source + d, params.head_size - d), stride - d);
        }
      }
    }
  });
  const int64_t all_rows = space.num_rows * unit.num_kv_heads;
  for (int64_t i = 0; i < all_rows; ++i) space.running[i] = {-kInfinity, 0.0f};
  for (int64_t i = 0; i < all_rows * space.out_stride; i += kLanes) store(space.out + i, zero());
}

// Where the keys and values of one tile lie, for KV head 0; null for keys that no row of the unit
// sees.
template <typename T>
struct Tile {
  int64_t first_key;
  int num_keys;
  const T* keys[kTileKeys];
  const T* values[kTileKeys];
};

template <typename T>
void locate(const AttentionParams& params, const Unit& unit, int64_t first_key, Tile<T>& tile) {
  const int64_t left = unit.keys.end - first_key;
  tile.first_key = first_key;
  tile.num_keys = left <= 0 ? 0 : static_cast<int>(left < unit.tile_keys ? left : unit.tile_keys);
  const int32_t* const blocks = params.block_table + unit.seq * params.block_table_stride;
  int64_t column = first_key / params.block_size, slot = first_key % params.block_size;
  for (int i = 0; i < tile.num_keys; ++i) {
    const bool seen = first_key + i >= unit.keys.begin;
    const int64_t block = seen ? blocks[column] : 0;
    const auto row = [&](const CacheHalf<const void*>& half) {
      return static_cast<const T*>(half.data) + block * half.stride_block + slot * half.stride_slot;
    };
    tile.keys[i] = seen ? row(params.key_cache) : nullptr;
    tile.values[i] = seen ? row(params.value_cache) : nullptr;
    if (++slot == params.block_size) ++column, slot = 0;
  }
}

// The part of a tile that a token sees, counted from the tile's first key.
template <typename T>
KeyRange seen_in_tile(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                      int64_t token) {
  KeyRange seen = visible_keys(params, unit.seq_len, unit.first_position + token);
  seen.begin = seen.begin - tile.first_key > 0 ? seen.begin - tile.first_key : 0;
  seen.end = seen.end - tile.first_key < tile.num_keys ? seen.end - tile.first_key : tile.num_keys;
  return seen;
}

// Scores to weights for all rows; true if every row sees every key of the tile that is not null.
template <typename Math, typename T>
bool softmax_rows(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                  int64_t kv_head, const Workspace<typename Math::Element>& space,
                  RunningSoftmax* running) {
  const int64_t group_size = params.group_size(), head = unit.first_kv_head + kv_head;
  const Scoring scoring = make_scoring(params, static_cast<int>(head));
  const int num_vectors = (tile.num_keys + kLanes - 1) / kLanes;
  const int64_t first_seen = unit.keys.begin - tile.first_key;
  bool all_seen = true;
  int64_t i = 0;
  for (int64_t token = 0; token < unit.num_tokens; ++token) {
    Row row{seen_in_tile(params, unit, tile, token), 0.0f,
            unit.first_position + token - tile.first_key};
    all_seen = all_seen && row.seen.begin <= (first_seen > 0 ? first_seen : 0) &&
               row.seen.end == tile.num_keys;
    for (int64_t member = 0; member < group_size; ++member, ++i) {
      if (params.alibi_slopes != nullptr) {
        row.slope = params.alibi_slopes[head * group_size + member] * kLog2E;
      }
      space.rescale[i] = softmax_row<Math>(scoring, row, space.scores + i * kTileKeys, num_vectors,
                                           space.weights + i * kTileKeys, running[i]);
    }
  }
  return all_seen;
}

// 0 * x is NaN exactly where x is not finite: a row of zero weights tells.
template <typename Math>
bool all_finite(Product<Math, Packed> product, int head_size) {
  typename Math::Element zeros[kTileKeys] = {};
  float sums[kMaxHeadSize + kLanes];
  product.a = zeros;
  product.c = sums;
  product.rescale = nullptr;
  product.num_rows = 1;
  multiply(product);
  for (int i = 0; i < head_size; ++i) {
    if (sums[i] != 0) return false;
  }
  return true;
}

// out = rescale * out + weights x values, values packed first.
template <typename Math, typename T>
void add_values(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                int64_t head_offset, bool all_seen, float* packed, Product<Math, Packed> product) {
  const int num_keys = tile.num_keys, head_size = params.head_size;
  pack_values<Math>(HeadRows<T>(tile.values, head_offset, num_keys, {0, num_keys}), num_keys,
                    head_size, packed);
  if (all_seen || all_finite(product, head_size)) return multiply(product);
  // Some row does not see a value that is not finite, and its weight 0 would not keep it out.
  const int num_rows = product.num_rows;
  product.num_rows = 1;
  for (int i = 0; i < num_rows; ++i) {
    const KeyRange seen = seen_in_tile(params, unit, tile, i / params.group_size());
    pack_values<Math>(HeadRows<T>(tile.values, head_offset, num_keys, seen), num_keys, head_size,
                      packed);
    multiply(product);
    product.a += product.a_stride;
    product.c += product.c_stride;
    ++product.rescale;
  }
}

// Calls run(true) if the head is a whole number of vectors of words.
template <typename Math, typename Run>
void with_whole(int head_size, Run&& run) {
  if (head_size % (kLanes * Math::kDepth) == 0) return run(std::true_type());
  run(std::false_type());
}

// Rows for which keys and values are not packed.
constexpr int kMaxDirectRows = 2 * kBlockRows;

// How often Ahead is asked to fetch while a tile is computed with, about.
template <typename Math>
int64_t num_steps(const AttentionParams& params, const Unit& unit, int num_rows) {
  const int words = divide_up(params.head_size, kLanes * Math::kDepth);
  const int keys = divide_up(unit.tile_keys, kLanes) * kLanes;
  if (num_rows > kMaxDirectRows) return unit.num_kv_heads * (keys / kLanes) * words;
  const int dots = keys / 2 * (num_rows / kDotRows + num_rows % kDotRows) * words;
  const int columns = divide_up(divide_up(params.head_size, kLanes), kBlockColumns);
  const int products = keys / Math::kDepth * num_rows * columns;
  return unit.num_kv_heads * (dots + products);
}

template <typename Math, typename T>
void attend_tile(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                 int64_t kv_head, const Workspace<typename Math::Element>& space, Ahead& ahead) {
  const int64_t head = unit.first_kv_head + kv_head, first_row = kv_head * space.num_rows;
  const int num_rows = static_cast<int>(space.num_rows);
  const KeyRange all{0, tile.num_keys};

  const HeadRows<T> keys(tile.keys, head * params.key_cache.stride_head, tile.num_keys, all);
  const auto* const query = space.query + first_row * space.query_stride;
  if (num_rows <= kMaxDirectRows) {
    int row = 0;
    const auto dot = [&](auto rows) {
      with_whole<Math>(params.head_size, [&](auto whole) {
        dot_keys<rows(), whole(), Math>(query + row * space.query_stride, space.query_stride, keys,
                                        tile.num_keys, params.head_size,
                                        space.scores + row * kTileKeys, ahead);
      });
      row += rows();
    };
    while (num_rows - row >= kDotRows) dot(std::integral_constant<int, kDotRows>());
    while (row < num_rows) dot(std::integral_constant<int, 1>());
  } else {
    pack_keys<Math>(keys, tile.num_keys, params.head_size, space.packed, ahead);
    multiply(Product<Math, Packed>{query,
                                   space.query_stride,
                                   {space.packed, kTileKeys},
                                   nullptr,
                                   space.scores,
                                   kTileKeys,
                                   num_rows,
                                   divide_up(params.head_size, Math::kDepth),
                                   divide_up(tile.num_keys, kLanes)});
  }
  const bool all_seen =
      softmax_rows<Math>(params, unit, tile, kv_head, space, space.running + first_row);

  const int64_t offset = head * params.value_cache.stride_head;
  const auto sum_of = [&](auto right) {
    return Product<Math, decltype(right)>{space.weights,
                                          kTileKeys,
                                          right,
                                          space.rescale,
                                          space.out + first_row * space.out_stride,
                                          space.out_stride,
                                          num_rows,
                                          divide_up(tile.num_keys, Math::kDepth),
                                          divide_up(params.head_size, kLanes)};
  };
  if (all_seen && num_rows <= kMaxDirectRows) {
    const HeadRows<T> values(tile.values, offset, tile.num_keys, all);
    with_whole<Math>(params.head_size, [&](auto whole) {
      multiply(sum_of(Unpacked<Math, T, whole()>{values.row, params.head_size, &ahead}));
    });
  } else {
    add_values(params, unit, tile, offset, all_seen, space.packed,
               sum_of(Packed{space.packed, space.out_stride}));
  }
}

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

// Normalises one finished row. The sink joins here, once, as a score without a value.
void write_row(const AttentionParams& params, int64_t token, int64_t head, const float* sums,
               RunningSoftmax total) {
  float shrink = 1.0f;
  if (params.sinks != nullptr) {
    const float sink = params.sinks[head] * kLog2E;
    const float max = sink > total.max ? sink : total.max;
    if (max != -kInfinity) {
      shrink = std::exp2(total.max - max);
      total = {max, total.sum * shrink + std::exp2(sink - max)};
    }
  }
  const Scale& v_scale = params.v_scale;
  const int64_t kv_head = head / params.group_size();
  const float dequantise = v_scale.data == nullptr ? 1.0f : v_scale.data[kv_head * v_scale.stride];
  write_out(params, token, head, sums, shrink * dequantise / total.sum);
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
      const int64_t row = kv_head * space.num_rows + i;
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
void attend_unit(const AttentionParams& params, const Schedule& schedule, int64_t index) {
  const Unit unit = schedule.unit(index);
  const auto space = make_workspace<Math>(params, unit);
  start(params, unit, space);
  // Tiles begin at multiples of their size, wherever the unit's keys do.
  int64_t key = unit.keys.begin / unit.tile_keys * unit.tile_keys;
  Tile<T> tiles[2];
  locate(params, unit, key, tiles[0]);
  for (int i = 0; key < unit.keys.end; i = 1 - i) {
    key += unit.tile_keys;
    locate(params, unit, key, tiles[1 - i]);
    Ahead ahead;
    if (unit.num_kv_heads > 1) {
      plan_ahead(params, unit, tiles[1 - i], ahead);
      ahead.start(num_steps<Math>(params, unit, static_cast<int>(space.num_rows)));
    }
    for (int kv_head = 0; kv_head < unit.num_kv_heads; ++kv_head) {
      attend_tile<Math>(params, unit, tiles[i], kv_head, space, ahead);
    }
  }
  finish(params, schedule, unit, space);
}

// Adds up the partial results of one row in the order of the splits. `sums` is where, and may be
// the first of them.
RunningSoftmax merge_partials(const Partials& partials, int64_t first, int64_t num_splits,
                              int64_t width, float* sums) {
  float max = -kInfinity;
  for (int64_t i = first; i < first + num_splits; ++i) {
    // A NaN is the maximum, and stays it.
    if (!(partials.max[i] <= max)) max = partials.max[i];
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
  const Cut cut = cut_sequence(params, seq);
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

// MathOf<T>: the arithmetic for a cache of T.
template <template <typename> class MathOf>
void attention(const AttentionParams& params) {
  const Schedule schedule(params);
  with_cache_type(params.cache_dtype, [&](auto type) {
    using T = decltype(type);
    for_each_unit(schedule.num_units(), schedule.max_threads(), [&](int64_t index) {
      attend_unit<typename MathOf<T>::type, T>(params, schedule, index);
    });
  });
  if (schedule.has_splits()) {
    for_each_unit(params.num_seqs, schedule.max_threads(),
                  [&](int64_t seq) { merge_sequence(params, schedule, seq); });
  }
  write_padding(params);
}

}  // namespace
}  // namespace paged_ops::cpu
