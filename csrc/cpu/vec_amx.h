// AMX: products of tiles of 16 rows of 64 bytes, for bfloat16 caches. The rest is AVX-512's.
#include "vec_avx512bf16.h"

namespace paged_ops::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;  // 32-bit words of a row

constexpr int kPairRows = kTileRows / 2;  // up to so many, values are not packed: see PairSums

// The tile registers, as long as a thread computes one unit. What is multiplied lies in 4 and 5 (on
// the left) and 6 and 7 (on the right), sums in 0 to 3. Of few rows the weights and their sums lie
// in 4, 0 and 1, and the query and its products with 16 keys, which are on the left then, in 5, 2
// and 3; for more rows all tiles are whole.
//
// Torch's own kernels use the tiles too: their configuration is put back.
class AmxTiles {
 public:
  explicit AmxTiles(int64_t num_rows) {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration wanted{};
    wanted.palette = 1;
    const int64_t rows = num_rows <= kPairRows ? 2 * num_rows : num_rows;
    for (int tile = 0; tile < 8; ++tile) {
      const bool few = (tile < 2 || tile == 4) && rows < kTileRows;
      const bool narrow = tile == 2 || tile == 3 || tile == 5;
      wanted.rows[tile] = static_cast<uint8_t>(few ? rows : kTileRows);
      wanted.row_bytes[tile] = static_cast<uint16_t>(narrow ? 4 * score_columns(num_rows) : 64);
    }
    use(wanted);
  }
  ~AmxTiles() { use(before_); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  // Columns of the query's rows beside 16 keys: few of them are put into rows of keys faster.
  static int score_columns(int64_t num_rows) { return num_rows <= 4 ? 4 : num_rows <= 8 ? 8 : 16; }

 private:
  struct alignas(64) Configuration {
    uint8_t palette;  // 0: none
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  // GCC 12's own intrinsics for the two say that they touch the first eight bytes.
  static void use(const Configuration& configuration) {
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }

  Configuration before_;
};

// What tiles are loaded from has been written: GCC 12's intrinsics do not say that they read
// memory.
inline void finish_writes() { asm volatile("" : : : "memory"); }

struct AmxMath : BFloat16Math {
  static constexpr int kHeadMultiple = 2 * kTileWords;
  static constexpr int kRowMultiple = kTileRows;
  static constexpr int kKeyMultiple = 2 * kTileWords;
  static constexpr int kFewRows = kTileRows;
  static constexpr int kLeastRows = 3;
  using OfFewerRows = BFloat16Math;
  using Tiles = AmxTiles;
};

}  // namespace
}  // namespace paged_ops::cpu
