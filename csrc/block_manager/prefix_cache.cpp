#include "prefix_cache.h"

#include <algorithm>
#include <cstring>

#include "errors.h"

namespace paged_ops {
namespace {

constexpr uint32_t kChunk = 1024;                 // blocks
constexpr uint64_t kFirstId = uint64_t{1} << 63;  // salts are below

__extension__ typedef unsigned __int128 uint128_t;

uint64_t low(uint128_t x) { return static_cast<uint64_t>(x); }
uint64_t high(uint128_t x) { return static_cast<uint64_t>(x >> 64); }

uint128_t multiply(uint64_t a, uint64_t b) { return static_cast<uint128_t>(a) * b; }

// Two tokens; no two pairs of 32-bit tokens make the same word.
uint64_t word(const int64_t* two) {
  return static_cast<uint64_t>(two[0]) + (static_cast<uint64_t>(two[1]) << 32);
}

// Every bit of the result depends on every bit of x.
uint64_t scramble(uint64_t x) {
  const uint128_t once = multiply(x ^ 0x9e3779b97f4a7c15u, 0xd1342543de82ef95u);
  const uint128_t twice = multiply(low(once) ^ high(once), 0xaf251af3b0f025b5u);
  return low(twice) ^ high(twice);
}

}  // namespace

PrefixCache::PrefixCache(int64_t num_blocks, int64_t block_size)
    : block_size_(block_size),
      num_blocks_(num_blocks),
      keys_((block_size + 3) / 4 * 2),
      chunks_((num_blocks + kChunk - 1) / kChunk),
      next_id_(kFirstId) {
  for (size_t i = 0; i < keys_.size(); ++i) keys_[i] = scramble(i + 1);
}

Chain PrefixCache::begin(int64_t salt) {
  require_at_least("salt", 0, salt);
  const uint64_t root = static_cast<uint64_t>(salt);
  return {{scramble(root), scramble(~root)}, root, -1};
}

// Within a block the tokens are hashed independently of what precedes, so that the processor works
// on several blocks at once: after the function NH of Black et al., "UMAC: Fast and Secure Message
// Authentication" (1999), products of pairs of words are summed, each word shifted by its place's
// key. The halves of the products are summed apart, which needs no carry. The sums are then
// chained.
Hash128 PrefixCache::extend(Hash128 hash, const int64_t* tokens) const {
  Hash128 sum;
  const auto add = [&](const int64_t* four, int64_t place) {
    const uint128_t product =
        multiply(word(four) + keys_[place], word(four + 2) + keys_[place + 1]);
    sum.low += low(product);
    sum.high += high(product);
  };
  const int64_t whole = block_size_ - block_size_ % 4;
  for (int64_t i = 0; i < whole; i += 4) add(tokens + i, i / 2);
  if (whole < block_size_) {
    int64_t rest[4] = {};
    std::copy(tokens + whole, tokens + block_size_, rest);
    add(rest, whole / 2);
  }
  const uint128_t linked = multiply(hash.low ^ sum.low, hash.high ^ sum.high ^ keys_[0]);
  return {low(linked) ^ high(linked), high(linked) ^ (sum.low + sum.high)};
}

// Most blocks are found without a hash: where the block before was last continued.
std::vector<int32_t> PrefixCache::match(Span<const int64_t> tokens, Chain* chain) const {
  const int64_t num_blocks = tokens.size / block_size_;
  std::vector<int32_t> blocks;
  blocks.reserve(num_blocks);
  int32_t guess = -1;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t* const wanted = tokens.data + i * block_size_;
    if (guess < 0 || !holds(guess, wanted, chain->last)) {
      const Place place = find(wanted, *chain);
      if (!place.equal) break;
      guess = place.block;
    }
    blocks.push_back(guess);
    *chain = ending_with(guess);
    guess = entry(guess).next;
  }
  return blocks;
}

PrefixCache::Place PrefixCache::find(const int64_t* tokens, const Chain& chain) const {
  const Hash128 hash = extend(chain.hash, tokens);
  const int32_t block = table_.find(hash);
  return {hash, block, block >= 0 && holds(block, tokens, chain.last)};
}

void PrefixCache::reserve(const int32_t* blocks, int64_t count) {
  if (count <= 0) return;
  table_.reserve(table_.size() + count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = static_cast<uint32_t>(blocks[i]) / kChunk;
    Chunk& chunk = chunks_[index];
    if (!chunk.entries.empty()) continue;
    const int64_t size = std::min<int64_t>(kChunk, num_blocks_ - index * kChunk);
    chunk.tokens.reset(new int64_t[size * block_size_]);
    chunk.entries.resize(size);
  }
}

void PrefixCache::insert(int32_t block, const int64_t* tokens, Hash128 hash, Chain* chain) {
  table_.insert(hash, block);
  std::copy_n(tokens, block_size_, tokens_of(block));
  entry(block) = {hash, next_id_++, chain->last, -1};
  if (chain->block >= 0 && has_end(*chain)) entry(chain->block).next = block;
  *chain = ending_with(block);
}

// Its id goes too, so that neither a chain nor a block before takes it for what it was.
void PrefixCache::erase(int32_t block) {
  table_.erase(entry(block).hash);
  entry(block) = {};
}

Chain PrefixCache::ending_with(int32_t block) const {
  return {entry(block).hash, entry(block).id, block};
}

void PrefixCache::check(int32_t block) const {
  require_invariant(!chunks_[static_cast<uint32_t>(block) / kChunk].entries.empty() &&
                        table_.find(entry(block).hash) == block,
                    "a cached block is found by its hash");
  require_invariant(entry(block).previous < entry(block).id,
                    "a prefix is cached before what follows");
}

PrefixCache::Entry& PrefixCache::entry(int32_t block) {
  return chunks_[static_cast<uint32_t>(block) / kChunk]
      .entries[static_cast<uint32_t>(block) % kChunk];
}

const PrefixCache::Entry& PrefixCache::entry(int32_t block) const {
  return chunks_[static_cast<uint32_t>(block) / kChunk]
      .entries[static_cast<uint32_t>(block) % kChunk];
}

int64_t* PrefixCache::tokens_of(int32_t block) const {
  return &chunks_[static_cast<uint32_t>(block) / kChunk]
              .tokens[static_cast<uint32_t>(block) % kChunk * block_size_];
}

bool PrefixCache::holds(int32_t block, const int64_t* wanted, uint64_t previous) const {
  return entry(block).previous == previous &&
         std::memcmp(tokens_of(block), wanted, block_size_ * sizeof(int64_t)) == 0;
}

}  // namespace paged_ops
