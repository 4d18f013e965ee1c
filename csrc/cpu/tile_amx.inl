// The two matrix products in AMX tiles. On the right a tile holds 16 words of 16 columns, as keys
// and values are packed for any instruction set.

namespace paged_ops::cpu {
namespace {

// c = c + a b, or a b where rescale is null, for 1 or 2 tiles of rows and as many of columns.
template <int kRowTiles, int kColumnTiles>
inline void multiply_tiles(const Product<AmxMath, Packed>& p, int row, int column) {
  const int64_t a_bytes = p.a_stride * 2, b_bytes = p.b.stride * 4, c_bytes = p.c_stride * 4;
  const BFloat16* a = p.a + row * p.a_stride;
  const float* b = p.b.data + column * kLanes;
  float* const c = p.c + row * p.c_stride + column * kLanes;
  float* const lower = c + kTileRows * p.c_stride;
  constexpr bool kTwoRows = kRowTiles == 2, kTwoColumns = kColumnTiles == 2;
  finish_writes();
  if (p.rescale == nullptr) {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, c + kLanes, c_bytes);
    if constexpr (kTwoRows) _tile_loadd(2, lower, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, lower + kLanes, c_bytes);
  }
  for (int word = 0; word < p.num_words; word += kTileWords) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    p.b.meanwhile();
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b + kLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      p.b.meanwhile();
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + kTileRows * p.a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    a += 2 * kTileWords;
    b += kTileWords * p.b.stride;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (kTwoRows) _tile_stored(2, lower, c_bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, lower + kLanes, c_bytes);
}

template <int kRowTiles>
void multiply_tile_rows(const Product<AmxMath, Packed>& p, int row) {
  int column = 0;
  for (; p.num_columns - column >= 2; column += 2) multiply_tiles<kRowTiles, 2>(p, row, column);
  if (column < p.num_columns) multiply_tiles<kRowTiles, 1>(p, row, column);
}

// A tile cannot be scaled in its register. Most often there is nothing to scale: the largest score
// was met in an earlier tile.
void rescale_rows(const Product<AmxMath, Packed>& p) {
  for (int row = 0; row < p.num_rows; ++row) {
    if (p.rescale[row] == 1.0f) continue;
    float* const c = p.c + row * p.c_stride;
    const Vec factor = broadcast(p.rescale[row]);
    for (int i = 0; i < p.num_columns; ++i)
      store(c + i * kLanes, mul(factor, load(c + i * kLanes)));
  }
}

// Rows up to a multiple of kTileRows are there: see Workspace.
void multiply(const Product<AmxMath, Packed>& p) {
  if (p.rescale != nullptr) rescale_rows(p);
  int row = 0;
  for (; p.num_rows - row > kTileRows; row += 2 * kTileRows) multiply_tile_rows<2>(p, row);
  if (row < p.num_rows) multiply_tile_rows<1>(p, row);
}

// For few rows the query is transposed, once, and keys are the rows on the left: most often they
// can be loaded from where they lie in the cache.
template <>
int64_t query_words<AmxMath>(const AttentionParams& params) {
  return round_up(params.head_size, AmxMath::kHeadMultiple) / AmxMath::kDepth * kLanes;
}

void arrange_query(AmxMath, const Unit& unit, const Workspace<BFloat16>& space) {
  if (space.num_rows > AmxMath::kFewRows) return;
  const int num_words = static_cast<int>(space.query_stride) / AmxMath::kDepth;
  float* words = space.query_words;
  for (int64_t kv_head = 0; kv_head < unit.num_kv_heads; ++kv_head) {
    const BFloat16* const rows = space.query + kv_head * space.head_rows * space.query_stride;
    for (int word = 0; word < num_words; word += kLanes, words += kLanes * kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = i < space.num_rows ? BFloat16Math::load_words(
                                             rows + i * space.query_stride + 2 * word, 2 * kLanes)
                                       : zero();
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(words + i * kLanes, square[i]);
    }
  }
}

// 16 keys of one head: in the cache, if bfloat16 lie there at even distances, else in `copy`.
struct KeyRows {
  const BFloat16* data;
  int64_t stride;  // bytes

  template <typename T>
  KeyRows(const AttentionParams& params, const Tile<T>& tile, int first, int64_t head_offset,
          BFloat16* copy) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const bool whole = params.head_size % AmxMath::kHeadMultiple == 0;
      const bool one_block = params.block_size % kTileRows == 0;
      if (first < tile.num_keys && tile.keys[first] != nullptr && whole && one_block) {
        data = tile.keys[first] + head_offset;
        stride = params.key_cache.stride_slot * 2;
        return;
      }
    }
    const int64_t width = round_up(params.head_size, AmxMath::kHeadMultiple);
    for (int i = 0; i < kTileRows; ++i) {
      const bool counts = first + i < tile.num_keys && tile.keys[first + i] != nullptr;
      const T* const row = counts ? tile.keys[first + i] + head_offset : nullptr;
      for (int64_t d = 0; d < width; d += 2 * kLanes) {
        const int left = static_cast<int>(params.head_size - d);
        const Vec words = counts ? BFloat16Math::load_words(row + d, left) : zero();
        std::memcpy(copy + i * width + d, &words, sizeof words);
      }
    }
    data = copy;
    stride = width * 2;
  }
};

// Products of 16 keys with up to kRows rows, to rows of keys.
template <int kRows>
inline void store_transposed(const float* products, float* scores) {
  Vec square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = load(products + i * kLanes);
  transpose(square);
  for (int i = 0; i < kRows; ++i) store(scores + i * kTileKeys, square[i]);
}

template <typename T>
void score_few_rows(AmxMath, const AttentionParams& params, const Tile<T>& tile,
                    int64_t head_offset, int64_t first_row, const Workspace<BFloat16>& space,
                    Ahead& ahead) {
  alignas(64) BFloat16 copies[2][kTileRows * kMaxHeadSize];
  alignas(64) float products[2][kTileRows * kLanes];
  const int64_t num_words = space.query_stride / AmxMath::kDepth;
  const float* const words = space.query_words + first_row / space.head_rows * num_words * kLanes;
  for (int key = 0; key < tile.num_keys; key += 2 * kTileRows) {
    const KeyRows low(params, tile, key, head_offset, copies[0]);
    const KeyRows high(params, tile, key + kTileRows, head_offset, copies[1]);
    finish_writes();
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t word = 0; word < num_words; word += kTileWords) {
      _tile_loadd(6, words + word * kLanes, 4 * kLanes);
      _tile_loadd(5, low.data + 2 * word, low.stride);
      _tile_dpbf16ps(2, 5, 6);
      ahead.fetch();
      _tile_loadd(7, high.data + 2 * word, high.stride);
      _tile_dpbf16ps(3, 7, 6);
      ahead.fetch();
    }
    _tile_stored(2, products[0], 4 * kLanes);
    _tile_stored(3, products[1], 4 * kLanes);
    for (int i = 0; i < 2; ++i) {
      float* const scores = space.scores + key + i * kTileRows;
      if (space.num_rows == 1) {
        store_transposed<1>(products[i], scores);
      } else if (space.num_rows <= 4) {
        store_transposed<4>(products[i], scores);
      } else {
        store_transposed<kTileRows>(products[i], scores);
      }
    }
  }
}

int64_t num_steps(AmxMath, const AttentionParams& params, const Unit& unit, int num_rows) {
  const int64_t keys = round_up(unit.tile_keys, AmxMath::kKeyMultiple);
  const int64_t steps = divide_up(params.head_size, AmxMath::kHeadMultiple);
  const int64_t products = 2 * steps * keys / kTileRows;
  return unit.num_kv_heads * (products + keys / 2 + num_rows * keys / kLanes);
}

}  // namespace
}  // namespace paged_ops::cpu
