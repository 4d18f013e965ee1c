// What BlockManager says of itself: state() for people, check() for tests.
#include <algorithm>

#include "block_manager.h"

namespace paged_ops {

State BlockManager::state() const {
  const Lock lock(mutex_);
  State state{pool_.num_free(), pool_.num_evictable(),
              cache_.size(),    static_cast<int64_t>(pins_.size()),
              prefix_,          {}};
  for (const auto& [seq_id, slot] : slot_of_) {
    const Sequence& sequence = slots_[slot];
    state.sequences.push_back(
        {seq_id, sequence.length, sequence.published_blocks, sequence.blocks});
  }
  std::sort(state.sequences.begin(), state.sequences.end(),
            [](const auto& a, const auto& b) { return a.seq_id < b.seq_id; });
  return state;
}

void BlockManager::check() const {
  const Lock lock(mutex_);
  pool_.check();
  std::vector<int32_t> holders(pool_.size(), 0);
  for (const auto& [block, count] : pins_) {
    require_invariant(count > 0 && pool_.is_cached(block), "a pinned block is cached");
    holders[block] += count;
  }
  check_sequences(&holders);
  int64_t num_cached = 0;
  for (int32_t block = 0; block < pool_.size(); ++block) {
    require_invariant(holders[block] == pool_.holders(block),
                      "a block is counted once for each sequence or pin that holds it");
    if (!pool_.is_cached(block)) continue;
    cache_.check(block);
    ++num_cached;
  }
  require_invariant(num_cached == cache_.size(), "the cached blocks are counted");
}

void BlockManager::check_sequences(std::vector<int32_t>* holders) const {
  require_invariant(slot_of_.size() + free_slots_.size() == slots_.size(), "no slot is lost");
  for (const auto& [seq_id, slot] : slot_of_) {
    const Sequence& sequence = slots_[slot];
    require_invariant(sequence.seq_id == seq_id, "a slot knows its sequence");
    require_invariant(static_cast<int64_t>(sequence.blocks.size()) >= blocks_for(sequence.length),
                      "a sequence has the blocks that its length needs");
    require_invariant(sequence.published_blocks <= sequence.length / block_size_,
                      "only full blocks are published");
    for (const int32_t block : sequence.blocks) ++(*holders)[block];
  }
  for (const int32_t slot : free_slots_) {
    require_invariant(slots_[slot].blocks.empty(), "a free slot holds no block");
  }
}

}  // namespace paged_ops
