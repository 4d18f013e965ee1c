// What a thread keeps in memory while it computes a unit.

namespace paged_ops::cpu {
namespace {

// What a unit works with, in the thread's scratch memory. A row is a (token, query head of the
// group).
template <typename Element>
struct Workspace {
  int64_t num_rows;      // of one KV head
  int64_t head_rows;     // with padding
  int64_t query_stride;  // elements, whole words
  int64_t out_stride;
  Element* query;           // [num_kv_heads, head_rows, query_stride]
  float* out;               // [num_kv_heads, head_rows, out_stride], unnormalised
  RunningSoftmax* running;  // [num_kv_heads, head_rows]
  float* rescale;           // [head_rows]
  float* scores;            // [head_rows, kTileKeys], for kRowMultiple rows at least
  Element* weights;         // [head_rows, kTileKeys]
  float* packed;            // keys, then values
  float* query_words;       // what arrange_query makes of the query, if anything
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

// Elements of Workspace::query_words for one KV head, and what makes them.
template <typename Math>
int64_t query_words(const AttentionParams&) {
  return 0;
}
template <typename Math>
void arrange_query(Math, const Unit&, const Workspace<typename Math::Element>&) {}

template <typename Math>
int64_t carve_workspace(const AttentionParams& params, const Unit& unit, void* base,
                        Workspace<typename Math::Element>& space) {
  space.num_rows = unit.num_tokens * params.group_size();
  space.head_rows = space.num_rows <= Math::kRowMultiple
                        ? space.num_rows
                        : round_up(space.num_rows, Math::kRowMultiple);
  space.query_stride = round_up(params.head_size, Math::kHeadMultiple);
  space.out_stride = padded_head_size(params.head_size);
  const int64_t all_rows = space.head_rows * unit.num_kv_heads;
  Carver carver(base);
  carver.carve(space.query, all_rows * space.query_stride);
  carver.carve(space.out, all_rows * space.out_stride);
  carver.carve(space.running, all_rows);
  carver.carve(space.rescale, space.head_rows);
  carver.carve(space.scores, round_up(space.head_rows, Math::kRowMultiple) * kTileKeys);
  carver.carve(space.weights, space.head_rows * kTileKeys);
  carver.carve(space.packed, kPackedStride * space.out_stride);
  carver.carve(space.query_words, unit.num_kv_heads * query_words<Math>(params));
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
    for (int64_t kv_head = 0; kv_head < unit.num_kv_heads; ++kv_head) {
      Element* row = space.query + kv_head * space.head_rows * stride;
      for (int64_t i = 0; i < space.num_rows; ++i, row += stride) {
        const int64_t token = unit.first_token + i / group_size;
        const int64_t head = (unit.first_kv_head + kv_head) * group_size + i % group_size;
        const Query* const source =
            query + token * params.query_stride_token + head * params.query_stride_head;
        if (std::is_same_v<Query, Element> && stride == params.head_size) {
          std::memcpy(row, source, stride * sizeof(Element));
          continue;
        }
        for (int d = 0; d < stride; d += kLanes) {
          store(row + d, load(source + d, params.head_size - d), stride - d);
        }
      }
    }
  });
  const int64_t all_rows = space.head_rows * unit.num_kv_heads;
  for (int64_t i = 0; i < all_rows; ++i) space.running[i] = {-kInfinity, 0.0f};
  for (int64_t i = 0; i < all_rows * space.out_stride; i += kLanes) store(space.out + i, zero());
}

}  // namespace
}  // namespace paged_ops::cpu
