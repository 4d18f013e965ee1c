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

// Rows up to a multiple of kTileRows are there: see Workspace. Where there are so few of them that
// values are not packed but by way of exception, the tiles have another shape.
void multiply(const Product<AmxMath, Packed>& p) {
  if (p.num_rows <= kPairRows) return multiply_rows(p);
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

// 16 keys or values of one head: in the cache, if they are bfloat16 that lie there at even
// distances, else in `copy`, with zeros for what does not count.
struct TileRows {
  const BFloat16* data;
  int64_t stride;  // bytes

  template <typename T>
  static TileRows of(const AttentionParams& params, const CacheHalf<const void*>& half,
                     const T* const* rows, int num_rows, int64_t head_offset, BFloat16* copy) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const bool whole = params.head_size % AmxMath::kHeadMultiple == 0;
      const bool one_block = params.block_size % kTileRows == 0;
      if (whole && one_block && num_rows >= kTileRows && rows[0] != nullptr) {
        return {rows[0] + head_offset, half.stride_slot * 2};
      }
    }
    const int64_t width = round_up(params.head_size, AmxMath::kHeadMultiple);
    for (int i = 0; i < kTileRows; ++i) {
      const bool counts = i < num_rows && rows[i] != nullptr;
      const T* const row = counts ? rows[i] + head_offset : nullptr;
      for (int64_t d = 0; d < width; d += 2 * kLanes) {
        const int left = static_cast<int>(params.head_size - d);
        const Vec words = counts ? BFloat16Math::load_words(row + d, left) : zero();
        std::memcpy(copy + i * width + d, &words, sizeof words);
      }
    }
    return {copy, width * 2};
  }
};

// Products of 16 keys with kRows rows, to rows of keys.
template <int kRows>
inline void store_transposed(const float* products, float* scores) {
  if constexpr (kRows == kLanes) {
    Vec square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = load(products + i * kLanes);
    transpose(square);
    for (int i = 0; i < kLanes; ++i) store(scores + i * kTileKeys, square[i]);
    return;
  }
  // Of four keys in a row, the first of four rows; the next rows come one further.
  const __m512i key = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  const __m512i row = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i first = _mm512_add_epi32(_mm512_mullo_epi32(key, _mm512_set1_epi32(kRows)), row);
  for (int i = 0; i < kRows; i += 4, scores += 4 * kTileKeys) {
    const __m512i rows = _mm512_add_epi32(first, _mm512_set1_epi32(i));
    Vec four[4];  // keys, a row in each quarter
    for (int j = 0; j < 4; ++j) {
      const float* const from = products + j * 4 * kRows;
      four[j] = kRows == 4 ? _mm512_permutexvar_ps(rows, load(from))
                           : _mm512_permutex2var_ps(load(from), rows, load(from + kLanes));
    }
    const Vec low[] = {_mm512_shuffle_f32x4(four[0], four[1], 0x44),
                       _mm512_shuffle_f32x4(four[2], four[3], 0x44)};
    const Vec high[] = {_mm512_shuffle_f32x4(four[0], four[1], 0xee),
                        _mm512_shuffle_f32x4(four[2], four[3], 0xee)};
    store(scores, _mm512_shuffle_f32x4(low[0], low[1], 0x88));
    store(scores + kTileKeys, _mm512_shuffle_f32x4(low[0], low[1], 0xdd));
    store(scores + 2 * kTileKeys, _mm512_shuffle_f32x4(high[0], high[1], 0x88));
    store(scores + 3 * kTileKeys, _mm512_shuffle_f32x4(high[0], high[1], 0xdd));
  }
}

template <typename T>
void score_few_rows(AmxMath, const AttentionParams& params, const Tile<T>& tile,
                    int64_t head_offset, int64_t first_row, const Workspace<BFloat16>& space,
                    Ahead& ahead) {
  alignas(64) BFloat16 copies[2][kTileRows * kMaxHeadSize];
  alignas(64) float products[2][kTileRows * kLanes];
  const int64_t num_words = space.query_stride / AmxMath::kDepth;
  const float* const words = space.query_words + first_row / space.head_rows * num_words * kLanes;
  const int columns = AmxTiles::score_columns(space.num_rows);
  for (int key = 0; key < tile.num_keys; key += 2 * kTileRows) {
    const auto rows = [&](int first, BFloat16* copy) {
      return TileRows::of(params, params.key_cache, tile.keys + first, tile.num_keys - first,
                          head_offset, copy);
    };
    const TileRows low = rows(key, copies[0]), high = rows(key + kTileRows, copies[1]);
    finish_writes();
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t word = 0; word < num_words; word += kTileWords) {
      _tile_loadd(5, words + word * kLanes, 4 * kLanes);
      _tile_loadd(6, low.data + 2 * word, low.stride);
      _tile_dpbf16ps(2, 6, 5);
      ahead.fetch();
      _tile_loadd(7, high.data + 2 * word, high.stride);
      _tile_dpbf16ps(3, 7, 5);
      ahead.fetch();
    }
    _tile_stored(2, products[0], 4 * columns);
    _tile_stored(3, products[1], 4 * columns);
    for (int i = 0; i < 2; ++i) {
      float* const scores = space.scores + key + i * kTileRows;
      if (columns == 4) {
        store_transposed<4>(products[i], scores);
      } else if (columns == 8) {
        store_transposed<8>(products[i], scores);
      } else {
        store_transposed<kTileRows>(products[i], scores);
      }
    }
  }
}

// Values of few rows are not packed. A word of the cache holds two columns of one key: multiplied
// with a weight in the low half of a word it gives the even column, in the high half the odd one.
// So twice as many rows of weights give the sums of the even columns, then those of the odd ones.
struct PairSums {
  static constexpr int kRows = 2 * kPairRows, kStride = kMaxHeadSize / 2;
  alignas(64) uint32_t weights[kRows * kTileKeys];
  alignas(64) float sums[kRows * kStride];
  TileRows values[kTileKeys / kTileRows];
  int num_rows;  // of the query
  int num_groups;
  int num_columns;  // vectors of pairs

  template <typename T>
  PairSums(const AttentionParams& params, const Tile<T>& tile, int64_t head_offset,
           const Workspace<BFloat16>& space)
      : num_rows(static_cast<int>(space.num_rows)),
        num_groups(divide_up(tile.num_keys, kTileRows)),
        num_columns(divide_up(params.head_size, AmxMath::kHeadMultiple)) {
    auto* copy = reinterpret_cast<BFloat16*>(space.packed);
    for (int i = 0; i < num_groups; ++i, copy += kTileRows * 2 * kLanes * num_columns) {
      const int first = i * kTileRows;
      values[i] = TileRows::of(params, params.value_cache, tile.values + first,
                               tile.num_keys - first, head_offset, copy);
    }
    for (int row = 0; row < num_rows; ++row) {
      for (int key = 0; key < num_groups * kTileRows; key += kLanes) {
        const auto* const from = space.weights + row * kTileKeys + key;
        const __m512i low =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        _mm512_store_si512(weights + row * kTileKeys + key, low);
        _mm512_store_si512(weights + (num_rows + row) * kTileKeys + key,
                           _mm512_slli_epi32(low, 16));
      }
    }
  }

  template <int kColumnTiles>
  void multiply(int column, Ahead& ahead) {
    _tile_zero(0);
    if constexpr (kColumnTiles == 2) _tile_zero(1);
    for (int i = 0; i < num_groups; ++i) {
      const BFloat16* const data = values[i].data + column * 2 * kLanes;
      _tile_loadd(4, weights + i * kTileRows, kTileKeys * 4);
      _tile_loadd(6, data, values[i].stride);
      _tile_dpbf16ps(0, 4, 6);
      ahead.fetch();
      if constexpr (kColumnTiles == 2) {
        _tile_loadd(7, data + 2 * kLanes, values[i].stride);
        _tile_dpbf16ps(1, 4, 7);
        ahead.fetch();
      }
    }
    _tile_stored(0, sums + column * kLanes, kStride * 4);
    if constexpr (kColumnTiles == 2) _tile_stored(1, sums + (column + 1) * kLanes, kStride * 4);
  }

  void multiply(Ahead& ahead) {
    finish_writes();
    int column = 0;
    for (; num_columns - column >= 2; column += 2) multiply<2>(column, ahead);
    if (column < num_columns) multiply<1>(column, ahead);
  }

  // A weight of the other column, 0, does not keep out a value that is not finite.
  bool all_finite() const {
    Vec all = zero();
    for (int row = 0; row < 2 * num_rows; ++row) {
      Vec of_row = zero();  // not `all`, whose additions wait for each other
      for (int i = 0; i < num_columns; ++i) {
        of_row = multiply_add(zero(), load(sums + row * kStride + i * kLanes), of_row);
      }
      all = add(all, of_row);
    }
    return reduce_add(all) == 0;
  }

  // out = rescale * out + sums
  void add_to(float* out, int64_t out_stride, const float* rescale) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(kLanes / 2));
    for (int row = 0; row < num_rows; ++row, out += out_stride) {
      const Vec factor = broadcast(rescale[row]);
      const auto add = [&](int64_t at, Vec x) {
        store(out + at, multiply_add(factor, load(out + at), x));
      };
      for (int i = 0; i < num_columns; ++i) {
        const Vec even = load(sums + row * kStride + i * kLanes);
        const Vec odd = load(sums + (num_rows + row) * kStride + i * kLanes);
        const int64_t at = i * 2 * kLanes;
        add(at, _mm512_permutex2var_ps(even, low, odd));
        if (at + kLanes < out_stride) add(at + kLanes, _mm512_permutex2var_ps(even, high, odd));
      }
    }
  }
};

template <typename T>
bool add_unpacked(AmxMath, const AttentionParams& params, const Tile<T>& tile, int64_t head_offset,
                  int64_t first_row, const Workspace<BFloat16>& space, Ahead& ahead) {
  if (space.num_rows > kPairRows) return false;
  PairSums pairs(params, tile, head_offset, space);
  pairs.multiply(ahead);
  if (!pairs.all_finite()) return false;
  pairs.add_to(space.out + first_row * space.out_stride, space.out_stride, space.rescale);
  return true;
}

int64_t num_steps(AmxMath, const AttentionParams& params, const Unit& unit, int num_rows) {
  const int64_t keys = round_up(unit.tile_keys, AmxMath::kKeyMultiple);
  const int64_t steps = divide_up(params.head_size, AmxMath::kHeadMultiple);
  const int64_t products = 2 * steps * keys / kTileRows;
  const int64_t packing = num_rows > kPairRows ? keys / 2 : 0;
  return unit.num_kv_heads * (products + packing + num_rows * keys / kLanes);
}

}  // namespace
}  // namespace paged_ops::cpu
