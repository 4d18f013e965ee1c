// The two matrix products of a tile of keys and the rows of one query tile. K and V are repacked
// once for all rows; then both products run as outer products with the sums in registers and no
// reduction across lanes:
//
//   scores  [rows, keys]      = query   [rows, head_size] x keys   [head_size, keys]
//   out     [rows, head_size] = weights [rows, keys]      x values [keys, head_size]
//
// The index that is summed over counts words of 32 bits: one float (Float32Math), or the two
// bfloat16 that a dot-product instruction takes at once.

namespace paged_ops::cpu {
namespace {

// The arithmetic of a cache of any type in float32.
struct Float32Math {
  using Element = float;
  static constexpr int kDepth = 1;         // elements of a word
  static constexpr int kColumns = kLanes;  // of values that are packed at a time

  static Vec broadcast_word(const float* p) { return broadcast(*p); }
  static Vec multiply_add_words(Vec a, Vec b, Vec c) { return multiply_add(a, b, c); }

  template <typename T>
  static Vec load_words(const T* p, int count) {
    return load(p, count);
  }
  static void store_weights(float* p, Vec x) { store(p, x); }
  template <typename T>
  static void pack_values(const T* const (&rows)[1], int count, float* packed) {
    store(packed, rows[0] == nullptr ? zero() : load(rows[0], count));
  }
};

// Rows of keys or values, one for each key of a tile: rows[key] + offset. Where rows[key] is null,
// the key counts as zeros: its memory may hold anything.
template <typename T>
struct TileRows {
  const T* const* rows;
  int64_t offset;

  const T* row(int key) const { return rows[key] == nullptr ? nullptr : rows[key] + offset; }
};

// packed[word, key] for num_keys keys, rounded up to whole vectors.
template <typename Math, typename T>
void pack_keys(TileRows<T> keys, int num_keys, int head_size, float* packed) {
  for (int key = 0; key < num_keys; key += kLanes) {
    for (int first = 0; first < head_size; first += kLanes * Math::kDepth) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* const row = key + i < num_keys ? keys.row(key + i) : nullptr;
        square[i] = row == nullptr ? zero() : Math::load_words(row + first, head_size - first);
      }
      transpose(square);
      float* const corner = packed + first / Math::kDepth * kTileKeys + key;
      for (int i = 0; i < kLanes; ++i) store(corner + i * kTileKeys, square[i]);
    }
  }
}

// packed[word, column], a word holding kDepth consecutive keys. Keys outside `range` count as
// zeros.
template <typename Math, typename T>
void pack_values(TileRows<T> values, KeyRange range, int num_keys, int head_size, float* packed) {
  const int64_t width = padded_head_size(head_size);
  for (int key = 0; key < num_keys; key += Math::kDepth, packed += width) {
    const T* rows[Math::kDepth];
    for (int i = 0; i < Math::kDepth; ++i) {
      rows[i] = range.begin <= key + i && key + i < range.end ? values.row(key + i) : nullptr;
    }
    for (int column = 0; column < head_size; column += Math::kColumns) {
      Math::pack_values(rows, head_size - column, packed + column);
      for (const T*& row : rows) row = row == nullptr ? nullptr : row + Math::kColumns;
    }
  }
}

// c = rescale * c + a b, or a b where rescale is null.
template <typename Math>
struct Product {
  const typename Math::Element* a;  // [num_rows, num_words words]
  int64_t a_stride;
  const float* b;  // [num_words, num_columns vectors]
  int64_t b_stride;
  const float* rescale;  // [num_rows]
  float* c;              // [num_rows, num_columns vectors]
  int64_t c_stride;
  int num_rows;
  int num_words;
  int num_columns;
};

// Every element of c is one chain of sums in the order of the words, whatever the block: a row's
// result does not depend on the rows beside it.
template <int kRows, int kColumns, typename Math>
inline void multiply_block(const Product<Math>& p, int row, int column) {
  const auto* const a = p.a + row * p.a_stride;
  const float* b = p.b + column * kLanes;
  float* const c = p.c + row * p.c_stride + column * kLanes;
  Vec sum[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      sum[i][j] = p.rescale == nullptr
                      ? zero()
                      : mul(broadcast(p.rescale[row + i]), load(c + i * p.c_stride + j * kLanes));
    }
  }
  for (int word = 0; word < p.num_words; ++word, b += p.b_stride) {
    Vec right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = Math::broadcast_word(a + i * p.a_stride + word * Math::kDepth);
      for (int j = 0; j < kColumns; ++j) {
        sum[i][j] = Math::multiply_add_words(left, right[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) store(c + i * p.c_stride + j * kLanes, sum[i][j]);
  }
}

template <int kRows, int kColumns, typename Math>
void multiply_columns(const Product<Math>& p, int row, int column) {
  for (; p.num_columns - column >= kColumns; column += kColumns) {
    multiply_block<kRows, kColumns>(p, row, column);
  }
  if constexpr (kColumns > 1) multiply_columns<kRows, kColumns / 2>(p, row, column);
}

// In blocks of kRows, what is left in smaller ones.
template <int kRows = kBlockRows, typename Math>
void multiply(const Product<Math>& p, int row = 0) {
  for (; p.num_rows - row >= kRows; row += kRows) {
    multiply_columns<kRows, kBlockColumns>(p, row, 0);
  }
  if constexpr (kRows > 1) multiply<kRows / 2>(p, row);
}

}  // namespace
}  // namespace paged_ops::cpu
