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
  static constexpr int kDepth = 1;                 // elements of a word
  static constexpr int kColumns = kLanes;          // of values that are packed at a time
  static constexpr int kHeadMultiple = 1;          // elements that a head is padded to
  static constexpr int kRowMultiple = 1;           // rows, where there are more than these
  static constexpr int kKeyMultiple = kLanes;      // keys that a tile is padded to
  static constexpr int kFewRows = 2 * kBlockRows;  // for which keys and values are not packed
  static constexpr int kLeastRows = 0;             // with fewer another arithmetic is faster
  using OfFewerRows = Float32Math;
  using Tiles = NoTiles;

  static Vec broadcast_word(const float* p) { return broadcast(*p); }
  static Vec multiply_add_words(Vec a, Vec b, Vec c) { return multiply_add(a, b, c); }

  template <typename T>
  static Vec load_words(const T* p, int count) {
    return load(p, count);
  }
  static void store_weights(float* p, Vec x) { store(p, x); }
  template <typename T, int kCount>
  static void load_values(const T* const* rows, int first, int head_size, Vec (&row)[kCount]) {
    for (int i = 0; i < kCount; ++i) {
      const int column = first + i * kLanes;
      row[i] = load(rows[0] + column, head_size - column);
    }
  }
};

alignas(64) constexpr unsigned char kZeroRow[kMaxHeadSize * sizeof(float)] = {};

// One head's keys or values of a tile, a row each. Keys that do not count are a row of zeros: their
// own memory may hold anything.
template <typename T>
struct HeadRows {
  const T* row[kTileKeys];

  // Of `num_keys` rows given for head 0, null where there is none, those in `range`; the others,
  // and those up to a multiple of kKeyStep, are zeros.
  HeadRows(const T* const* rows, int64_t head_offset, int num_keys, KeyRange range) {
    const T* const zeros = reinterpret_cast<const T*>(kZeroRow);
    const int end = static_cast<int>(round_up(num_keys, kKeyStep));
    for (int key = 0; key < end; ++key) {
      const bool counts = (range.begin <= key) & (key < range.end) & (rows[key] != nullptr);
      row[key] = counts ? rows[key] + head_offset : zeros;
    }
  }
};

// packed[word, key] for num_keys keys, rounded up to whole vectors.
template <typename Math, typename T>
void pack_keys(const HeadRows<T>& keys, int num_keys, int head_size, float* packed, Ahead& ahead) {
  for (int key = 0; key < num_keys; key += kLanes) {
    for (int first = 0; first < head_size; first += kLanes * Math::kDepth) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = Math::load_words(keys.row[key + i] + first, head_size - first);
      }
      ahead.fetch();
      transpose(square);
      float* const corner = packed + first / Math::kDepth * kPackedStride + key;
      for (int i = 0; i < kLanes; ++i) store(corner + i * kPackedStride, square[i]);
    }
  }
}

// packed[word, column], a word holding kDepth consecutive keys.
template <typename Math, bool kWhole, typename T>
void pack_values(const HeadRows<T>& values, int num_keys, int head_size, float* packed,
                 Ahead& ahead) {
  constexpr int kVectors = Math::kColumns / kLanes;
  const int64_t width = padded_head_size(head_size);
  const int end = static_cast<int>(round_up(num_keys, Math::kKeyMultiple));
  for (int key = 0; key < end; key += Math::kDepth, packed += width) {
    ahead.fetch();
    for (int column = 0; column < head_size; column += Math::kColumns) {
      Vec words[kVectors];
      const int columns_end = kWhole ? column + Math::kColumns : head_size;
      Math::load_values(&values.row[key], column, columns_end, words);
      for (int i = 0; i < kVectors; ++i) store(packed + column + i * kLanes, words[i]);
    }
  }
}

// scores[row, key] for so few rows that packing the keys would not pay: products along the head,
// the sums over the lanes at the end. A score does not depend on the rows beside it. kWhole: the
// head is a whole number of vectors of words, and no load needs a mask. Not inlined: its loop needs
// all registers.
template <int kRows, bool kWhole, typename Math, typename T>
[[gnu::noinline]] void dot_keys(const typename Math::Element* query, int64_t query_stride,
                                const HeadRows<T>& keys, int num_keys, int head_size, float* scores,
                                Ahead& ahead) {
  for (int key = 0; key < num_keys; key += kLanes) {
    Vec sums[kRows][kLanes];
    for (int first = 0; first < kLanes; first += kDotKeys) {
      Vec sum[kRows][kDotKeys];
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
        for (int i = 0; i < kDotKeys; ++i) sum[row][i] = zero();
      }
      const T* const* const row_of = keys.row + key + first;
      constexpr int kStep = kLanes * Math::kDepth;
      for (int d = 0; d < head_size; d += kStep) {
        const int count = kWhole ? kStep : head_size - d;
        Vec words[kRows];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          words[row] = Math::load_words(query + row * query_stride + d, count);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kDotKeys; ++i) {
          const Vec key_words = Math::load_words(row_of[i] + d, count);
#pragma GCC unroll 16
          for (int row = 0; row < kRows; ++row) {
            sum[row][i] = Math::multiply_add_words(words[row], key_words, sum[row][i]);
          }
          if (i % 2 == 1) ahead.fetch();
        }
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
        for (int i = 0; i < kDotKeys; ++i) sums[row][first + i] = sum[row][i];
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(scores + row * kTileKeys + key, sum_lanes(sums[row]));
    }
  }
}

// The right-hand matrix of a product, [num_words, vectors of kLanes columns].
struct Packed {
  const float* data;
  int64_t stride;
  Ahead* ahead;

  template <int kColumns>
  void load_row(int word, int column, Vec (&row)[kColumns]) const {
    for (int i = 0; i < kColumns; ++i) {
      row[i] = load(data + word * stride + (column + i) * kLanes);
    }
  }
  void meanwhile() const { ahead->fetch(); }
};

// Values as they lie in the cache: for so few rows that packing them would not pay.
template <typename Math, typename T, bool kWhole>
struct Unpacked {
  const T* const* values;  // [num_words * kDepth]
  int head_size;
  Ahead* ahead;

  template <int kColumns>
  void load_row(int word, int column, Vec (&row)[kColumns]) const {
    const int first = column * kLanes, end = kWhole ? first + kColumns * kLanes : head_size;
    Math::load_values(values + word * Math::kDepth, first, end, row);
  }
  void meanwhile() const { ahead->fetch(); }
};

// c = rescale * c + a b, or a b where rescale is null.
template <typename Math, typename Right>
struct Product {
  const typename Math::Element* a;  // [num_rows, num_words words]
  int64_t a_stride;
  Right b;
  const float* rescale;  // [num_rows]
  float* c;              // [num_rows, num_columns vectors]
  int64_t c_stride;
  int num_rows;
  int num_words;
  int num_columns;
};

// Every element of c is one chain of sums in the order of the words, whatever the block: a row's
// result does not depend on the rows beside it.
template <int kRows, int kColumns, typename Math, typename Right>
inline void multiply_block(const Product<Math, Right>& p, int row, int column) {
  const auto* const a = p.a + row * p.a_stride;
  const Right b = p.b;
  const int num_words = p.num_words;
  const int64_t a_stride = p.a_stride;
  float* const c = p.c + row * p.c_stride + column * kLanes;
  Vec sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      sum[i][j] = p.rescale == nullptr
                      ? zero()
                      : mul(broadcast(p.rescale[row + i]), load(c + i * p.c_stride + j * kLanes));
    }
  }
  for (int word = 0; word < num_words; ++word) {
    Vec right[kColumns];
    b.load_row(word, column, right);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      b.meanwhile();
      const Vec left = Math::broadcast_word(a + i * a_stride + word * Math::kDepth);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        sum[i][j] = Math::multiply_add_words(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) store(c + i * p.c_stride + j * kLanes, sum[i][j]);
  }
}

template <int kRows, int kColumns, typename Math, typename Right>
void multiply_columns(const Product<Math, Right>& p, int row, int column) {
  for (; p.num_columns - column >= kColumns; column += kColumns) {
    multiply_block<kRows, kColumns>(p, row, column);
  }
  if constexpr (kColumns > 1) multiply_columns<kRows, kColumns / 2>(p, row, column);
}

// In blocks of kRows, what is left in smaller ones.
template <int kRows = kBlockRows, typename Math, typename Right>
void multiply_rows(const Product<Math, Right>& p, int row = 0) {
  for (; p.num_rows - row >= kRows; row += kRows) {
    multiply_columns<kRows, kBlockColumns>(p, row, 0);
  }
  if constexpr (kRows > 1) multiply_rows<kRows / 2>(p, row);
}

template <typename Math, typename Right>
void multiply(const Product<Math, Right>& p) {
  multiply_rows(p);
}

}  // namespace
}  // namespace paged_ops::cpu
