// Prefix caching: what BlockManager does with PrefixCache.
#include <string>

#include "block_manager.h"

namespace paged_ops {

int64_t BlockManager::lookup(Tokens tokens, int64_t salt) const {
  const Lock lock(mutex_);
  Chain chain = PrefixCache::begin(salt);
  return static_cast<int64_t>(cache_.match(tokens, &chain).size()) * block_size_;
}

int64_t BlockManager::share(int64_t seq_id, Tokens tokens, int64_t salt) {
  const Lock lock(mutex_);
  Sequence& sequence = find(seq_id);
  if (!sequence.blocks.empty()) {
    refuse("seq_id", "be of a sequence without tokens and blocks",
           std::to_string(seq_id) + " with " + std::to_string(sequence.length) + " tokens in " +
               std::to_string(sequence.blocks.size()) + " blocks");
  }
  require_length(seq_id, 0, tokens.size);
  Chain chain = PrefixCache::begin(salt);
  sequence.blocks = cache_.match(tokens, &chain);
  for (const int32_t block : sequence.blocks) pool_.hold(block);
  sequence.published_blocks = static_cast<int64_t>(sequence.blocks.size());
  sequence.length = sequence.published_blocks * block_size_;
  sequence.chain = chain;
  sequence.passed = PrefixCache::begin(salt);
  sequence.salt = salt;
  ++prefix_.shares;
  prefix_.tokens_asked += tokens.size;
  prefix_.tokens_found += sequence.length;
  return sequence.length;
}

int64_t BlockManager::publish(int64_t seq_id, Tokens tokens, int64_t salt) {
  const Lock lock(mutex_);
  Sequence& sequence = find(seq_id);
  const Chain root = PrefixCache::begin(salt);
  require_at_most("the number of tokens", sequence.length, tokens.size);
  if (sequence.published_blocks > 0 && salt != sequence.salt) {
    refuse("salt", "be the one that the sequence began with, " + std::to_string(sequence.salt),
           std::to_string(salt));
  }
  const int64_t num_blocks = tokens.size / block_size_;
  const int64_t first = goes_on(sequence) ? sequence.published_blocks : 0;
  cache_.reserve(sequence.blocks.data() + first, num_blocks - first);
  if (first == 0) {
    sequence.published_blocks = 0;
    sequence.chain = sequence.passed = root;
    sequence.salt = salt;
  }
  while (sequence.published_blocks < num_blocks &&
         publish_block(&sequence, tokens.data + sequence.published_blocks * block_size_)) {
    ++sequence.published_blocks;
  }
  return sequence.published_blocks * block_size_;
}

// Whether what follows the chain of the sequence can be found. Of the entries that it went through,
// those of other blocks may have been evicted since: as a rule the last of them first.
bool BlockManager::goes_on(const Sequence& sequence) const {
  return sequence.published_blocks > 0 && cache_.has_end(sequence.chain) &&
         cache_.has_end(sequence.passed);
}

// Whether the chain of the sequence goes on with these tokens, in its own block or in another's.
bool BlockManager::publish_block(Sequence* sequence, const int64_t* tokens) {
  const PrefixCache::Place place = cache_.find(tokens, sequence->chain);
  const int32_t own = sequence->blocks[sequence->published_blocks];
  if (place.equal) {
    sequence->chain = cache_.ending_with(place.block);
    if (place.block != own) sequence->passed = sequence->chain;
    return true;
  }
  if (place.block >= 0) {
    // Either two prefixes collide, or the block follows one that has been evicted since, and can be
    // found no more.
    if (pins_.count(place.block) > 0) return false;
    forget(place.block);
  }
  if (pool_.is_cached(own)) return false;  // published with other tokens or another salt
  cache_.insert(own, tokens, place.hash, &sequence->chain);
  pool_.set_cached(own, true);
  ++prefix_.blocks_published;
  return true;
}

int64_t BlockManager::pin(Tokens tokens, int64_t salt) {
  const Lock lock(mutex_);
  const std::vector<int32_t> blocks = match_all(tokens, salt);
  if (blocks.empty()) return 0;
  // What can fail comes first: the new entries, and room for them.
  std::unordered_map<int32_t, int32_t> unpinned;
  for (const int32_t block : blocks) {
    if (pins_.count(block) == 0) unpinned.emplace(block, 0);
  }
  pins_.reserve(pins_.size() + unpinned.size());
  ++pin_ends_[blocks.back()];
  pins_.merge(unpinned);
  for (const int32_t block : blocks) {
    ++pins_[block];
    pool_.hold(block);
  }
  return static_cast<int64_t>(blocks.size()) * block_size_;
}

int64_t BlockManager::unpin(Tokens tokens, int64_t salt) {
  const Lock lock(mutex_);
  const std::vector<int32_t> blocks = match_all(tokens, salt);
  if (blocks.empty()) return 0;
  const auto end = pin_ends_.find(blocks.back());
  if (end == pin_ends_.end()) {
    refuse("tokens", "be those of a pin, no fewer and no more",
           std::to_string(blocks.size()) + " full blocks that no pin ends with");
  }
  if (--end->second == 0) pin_ends_.erase(end);
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    if (--pins_[*block] == 0) pins_.erase(*block);
    pool_.release(*block);
  }
  return static_cast<int64_t>(blocks.size()) * block_size_;
}

void BlockManager::reset_prefix_cache() {
  const Lock lock(mutex_);
  for (const auto& [block, count] : pins_) {
    for (int32_t i = 0; i < count; ++i) pool_.release(block);
  }
  pins_.clear();
  pin_ends_.clear();
  for (int32_t block = 0; block < pool_.size(); ++block) {
    if (pool_.is_cached(block)) forget(block);
  }
  for (Sequence& sequence : slots_) sequence.published_blocks = 0;
}

std::vector<int32_t> BlockManager::match_all(Tokens tokens, int64_t salt) const {
  Chain chain = PrefixCache::begin(salt);
  std::vector<int32_t> blocks = cache_.match(tokens, &chain);
  const int64_t num_blocks = tokens.size / block_size_;
  if (static_cast<int64_t>(blocks.size()) < num_blocks) {
    refuse("tokens", "be cached in all of their " + std::to_string(num_blocks) + " full blocks",
           std::to_string(blocks.size()));
  }
  return blocks;
}

}  // namespace paged_ops
