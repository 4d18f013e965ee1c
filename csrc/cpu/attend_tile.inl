// One tile of keys and the rows of one KV head: scores, softmax, and the sum of values that goes on
// to the next tile. The keys are found through the block table row by row, so that any block size
// and any strides will do.

#include "ahead.inl"
#include "softmax.inl"
#include "tile.inl"
#include "workspace.inl"

namespace paged_ops::cpu {
namespace {

// Where the keys and values of one tile lie, for KV head 0; null for keys that no row of the unit
// sees, and on from the last key up to a multiple of kKeyStep.
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
  const int end = static_cast<int>(round_up(tile.num_keys, kKeyStep));
  for (int i = tile.num_keys; i < end; ++i) tile.keys[i] = tile.values[i] = nullptr;
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
                  RunningSoftmax* running, Ahead& ahead) {
  const int64_t group_size = params.group_size(), head = unit.first_kv_head + kv_head;
  const Scoring scoring = make_scoring(params, static_cast<int>(head));
  const int num_vectors =
      divide_up(tile.num_keys, Math::kKeyMultiple) * Math::kKeyMultiple / kLanes;
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
                                           space.weights + i * kTileKeys, running[i], ahead);
    }
  }
  return all_seen;
}

// 0 * x is NaN exactly where x is not finite: a row of zero weights tells.
template <typename Math>
bool all_finite(const Product<Math, Packed>& product) {
  Vec all = zero();
  for (int column = 0; column < product.num_columns; ++column) {
    Vec sum = zero();
    for (int word = 0; word < product.num_words; ++word) {
      Vec values[1];
      product.b.load_row(word, column, values);
      sum = Math::multiply_add_words(zero(), values[0], sum);
    }
    all = add(all, sum);
  }
  return reduce_add(all) == 0;
}

// Calls run(true) if the head is a whole number of vectors of words.
template <typename Math, typename Run>
void with_whole(int head_size, Run&& run) {
  if (head_size % (kLanes * Math::kDepth) == 0) return run(std::true_type());
  run(std::false_type());
}

// Values as a product takes them, those outside of `seen` as zeros.
template <typename Math, typename T>
void pack_tile_values(const Tile<T>& tile, int64_t head_offset, KeyRange seen, int head_size,
                      float* packed, Ahead& ahead) {
  const HeadRows<T> values(tile.values, head_offset, tile.num_keys, seen);
  with_whole<Math>(head_size, [&](auto whole) {
    pack_values<Math, whole()>(values, tile.num_keys, head_size, packed, ahead);
  });
}

// out = rescale * out + weights x values, values packed first.
template <typename Math, typename T>
void add_values(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                int64_t head_offset, bool all_seen, float* packed, Product<Math, Packed> product,
                Ahead& ahead) {
  const int head_size = params.head_size;
  pack_tile_values<Math>(tile, head_offset, {0, tile.num_keys}, head_size, packed, ahead);
  if (all_seen || all_finite(product)) return multiply(product);
  // Some row does not see a value that is not finite, and its weight 0 would not keep it out.
  const int num_rows = product.num_rows;
  product.num_rows = 1;
  for (int i = 0; i < num_rows; ++i) {
    const KeyRange seen = seen_in_tile(params, unit, tile, i / params.group_size());
    pack_tile_values<Math>(tile, head_offset, seen, head_size, packed, ahead);
    multiply_rows(product);
    product.a += product.a_stride;
    product.c += product.c_stride;
    ++product.rescale;
  }
}

// How often Ahead is asked to fetch while a tile is computed with, about.
template <typename Math>
int64_t num_steps(Math, const AttentionParams& params, const Unit& unit, int num_rows) {
  const int words = divide_up(params.head_size, kLanes * Math::kDepth);
  const int keys = divide_up(unit.tile_keys, kLanes) * kLanes;
  if (num_rows > Math::kFewRows) return unit.num_kv_heads * (keys / kLanes) * words;
  const int dots = keys / 2 * (num_rows / kDotRows + num_rows % kDotRows) * words;
  const int columns = divide_up(divide_up(params.head_size, kLanes), kBlockColumns);
  const int products = keys / Math::kDepth * num_rows * columns;
  return unit.num_kv_heads * (dots + products);
}

// The scores of few rows: the keys are not packed.
template <typename Math, typename T>
void score_few_rows(Math, const AttentionParams& params, const Tile<T>& tile, int64_t head_offset,
                    int64_t first_row, const Workspace<typename Math::Element>& space,
                    Ahead& ahead) {
  const HeadRows<T> keys(tile.keys, head_offset, tile.num_keys, {0, tile.num_keys});
  const auto* const query = space.query + first_row * space.query_stride;
  int64_t row = 0;
  const auto dot = [&](auto rows) {
    with_whole<Math>(params.head_size, [&](auto whole) {
      dot_keys<rows(), whole(), Math>(query + row * space.query_stride, space.query_stride, keys,
                                      tile.num_keys, params.head_size,
                                      space.scores + row * kTileKeys, ahead);
    });
    row += rows();
  };
  while (space.num_rows - row >= kDotRows) dot(std::integral_constant<int, kDotRows>());
  while (row < space.num_rows) dot(std::integral_constant<int, 1>());
}

template <typename Math, typename T>
void score_many_rows(const AttentionParams& params, const Tile<T>& tile, int64_t head_offset,
                     int64_t first_row, const Workspace<typename Math::Element>& space,
                     Ahead& ahead) {
  const HeadRows<T> keys(tile.keys, head_offset, tile.num_keys, {0, tile.num_keys});
  pack_keys<Math>(keys, tile.num_keys, params.head_size, space.packed, ahead);
  multiply(Product<Math, Packed>{space.query + first_row * space.query_stride,
                                 space.query_stride,
                                 {space.packed, kPackedStride, &ahead},
                                 nullptr,
                                 space.scores,
                                 kTileKeys,
                                 static_cast<int>(space.num_rows),
                                 divide_up(params.head_size, Math::kDepth),
                                 divide_up(tile.num_keys, kLanes)});
}

// out = rescale * out + weights x values, the values as `right` has them.
template <typename Math, typename T, typename Right>
Product<Math, Right> value_product(const AttentionParams& params, const Tile<T>& tile,
                                   int64_t first_row,
                                   const Workspace<typename Math::Element>& space, Right right) {
  return {space.weights,
          kTileKeys,
          right,
          space.rescale,
          space.out + first_row * space.out_stride,
          space.out_stride,
          static_cast<int>(space.num_rows),
          divide_up(tile.num_keys, Math::kDepth),
          divide_up(params.head_size, kLanes)};
}

// Adds the values of few rows, which all see every key, without packing them; false if it cannot.
template <typename Math, typename T>
bool add_unpacked(Math, const AttentionParams& params, const Tile<T>& tile, int64_t head_offset,
                  int64_t first_row, const Workspace<typename Math::Element>& space, Ahead& ahead) {
  if (space.num_rows > Math::kFewRows) return false;
  const HeadRows<T> values(tile.values, head_offset, tile.num_keys, {0, tile.num_keys});
  with_whole<Math>(params.head_size, [&](auto whole) {
    const Unpacked<Math, T, whole()> right{values.row, params.head_size, &ahead};
    multiply(value_product<Math>(params, tile, first_row, space, right));
  });
  return true;
}

template <typename Math, typename T>
void add_tile(const AttentionParams& params, const Unit& unit, const Tile<T>& tile, int64_t offset,
              int64_t first_row, bool all_seen, const Workspace<typename Math::Element>& space,
              Ahead& ahead) {
  if (all_seen && add_unpacked(Math(), params, tile, offset, first_row, space, ahead)) return;
  const Packed right{space.packed, space.out_stride, &ahead};
  add_values(params, unit, tile, offset, all_seen, space.packed,
             value_product<Math>(params, tile, first_row, space, right), ahead);
}

template <typename Math, typename T>
void attend_tile(const AttentionParams& params, const Unit& unit, const Tile<T>& tile,
                 int64_t kv_head, const Workspace<typename Math::Element>& space, Ahead& ahead) {
  const int64_t head = unit.first_kv_head + kv_head, first_row = kv_head * space.head_rows;
  const int64_t key_offset = head * params.key_cache.stride_head;
  if (space.num_rows <= Math::kFewRows) {
    score_few_rows(Math(), params, tile, key_offset, first_row, space, ahead);
  } else {
    score_many_rows<Math>(params, tile, key_offset, first_row, space, ahead);
  }
  const bool all_seen =
      softmax_rows<Math>(params, unit, tile, kv_head, space, space.running + first_row, ahead);
  add_tile<Math>(params, unit, tile, head * params.value_cache.stride_head, first_row, all_seen,
                 space, ahead);
}

}  // namespace
}  // namespace paged_ops::cpu
