#include "block_manager.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_set>

namespace paged_ops {
namespace {

[[noreturn]] void refuse(const std::string& argument, const std::string& expected,
                         const std::string& got) {
  throw std::invalid_argument(argument + " must " + expected + ", got " + got);
}

void require_at_least(const char* argument, int64_t smallest, int64_t value) {
  if (value < smallest) {
    refuse(argument, "be at least " + std::to_string(smallest), std::to_string(value));
  }
}

void require_invariant(bool holds, const char* what) {
  if (!holds) {
    throw std::logic_error(std::string("BlockManager: broken invariant: ") + what +
                           "; please report this");
  }
}

}  // namespace

OutOfBlocks::OutOfBlocks(int64_t needed_blocks, int64_t free_blocks)
    : std::runtime_error("out of blocks: " + std::to_string(needed_blocks) + " needed, " +
                         std::to_string(free_blocks) + " free"),
      needed(needed_blocks),
      free(free_blocks) {}

BlockManager::BlockManager(int64_t num_blocks, int64_t block_size) : block_size_(block_size) {
  require_at_least("num_blocks", 1, num_blocks);
  require_at_least("block_size", 1, block_size);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (num_blocks > kMost) {
    refuse("num_blocks", "be at most " + std::to_string(kMost), std::to_string(num_blocks));
  }
  ref_counts_.resize(num_blocks, 0);
  free_.resize(num_blocks);
  // Block 0 is on top of the stack.
  for (int64_t i = 0; i < num_blocks; ++i) free_[i] = static_cast<int32_t>(num_blocks - 1 - i);
}

void BlockManager::allocate(int64_t seq_id, int64_t num_tokens) {
  require_new(seq_id);
  require_at_least("num_tokens", 0, num_tokens);
  const int64_t needed = blocks_for(num_tokens);
  require_free(needed);
  Sequence& sequence = sequences_[seq_id];
  sequence.length = num_tokens;
  sequence.blocks.reserve(needed);
  for (int64_t i = 0; i < needed; ++i) sequence.blocks.push_back(take());
}

std::vector<BlockPair> BlockManager::append(const std::vector<int64_t>& seq_ids,
                                            int64_t num_tokens) {
  require_at_least("num_tokens", 1, num_tokens);
  require_distinct(seq_ids);
  require_free(blocks_to_append(seq_ids, num_tokens));
  std::vector<BlockPair> copies;
  for (const int64_t seq_id : seq_ids) {
    Sequence& sequence = sequences_.at(seq_id);
    if (writes_shared_block(sequence)) {
      int32_t& last = sequence.blocks.back();
      const int32_t own = take();
      copies.push_back({last, own});
      release(last);
      last = own;
    }
    sequence.length += num_tokens;
    while (static_cast<int64_t>(sequence.blocks.size()) < blocks_for(sequence.length)) {
      sequence.blocks.push_back(take());
    }
  }
  return copies;
}

void BlockManager::fork(int64_t parent_id, int64_t child_id) {
  const Sequence copy = find(parent_id);
  require_new(child_id);
  for (const int32_t block : copy.blocks) ++ref_counts_[block];
  sequences_.emplace(child_id, copy);
}

void BlockManager::free(int64_t seq_id) {
  const Sequence& sequence = find(seq_id);
  // From the back, so that the first block is on top of the stack again.
  std::for_each(sequence.blocks.rbegin(), sequence.blocks.rend(),
                [this](int32_t block) { release(block); });
  sequences_.erase(seq_id);
}

void BlockManager::write_step(const std::vector<int64_t>& seq_ids,
                              const std::vector<int64_t>& num_new_tokens,
                              const StepBuffers& buffers) const {
  int64_t token = 0;
  buffers.query_start_loc[0] = 0;
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const Sequence& sequence = find(seq_ids[i]);
    std::copy(sequence.blocks.begin(), sequence.blocks.end(),
              buffers.block_table + static_cast<int64_t>(i) * buffers.max_blocks);
    buffers.seq_lens[i] = static_cast<int32_t>(sequence.length);
    for (int64_t position = sequence.length - num_new_tokens[i]; position < sequence.length;
         ++position, ++token) {
      const int64_t block = sequence.blocks[position / block_size_];
      buffers.slot_mapping[token] = block * block_size_ + position % block_size_;
      buffers.positions[token] = position;
    }
    buffers.query_start_loc[i + 1] = static_cast<int32_t>(token);
  }
}

int32_t BlockManager::ref_count(int64_t block) const {
  if (block < 0 || block >= num_blocks()) {
    refuse("block", "be from 0 to " + std::to_string(num_blocks() - 1), std::to_string(block));
  }
  return ref_counts_[block];
}

void BlockManager::check() const {
  std::vector<int32_t> held(ref_counts_.size(), 0);
  for (const auto& [seq_id, sequence] : sequences_) {
    require_invariant(static_cast<int64_t>(sequence.blocks.size()) == blocks_for(sequence.length),
                      "a sequence has as many blocks as its length needs");
    for (const int32_t block : sequence.blocks) ++held[block];
  }
  require_invariant(held == ref_counts_, "a block is counted once for each sequence that holds it");
  for (const int32_t block : free_) {
    require_invariant(held[block] == 0, "a block is either held or free");
    held[block] = -1;
  }
  require_invariant(std::count(held.begin(), held.end(), 0) == 0, "no block is lost");
}

const BlockManager::Sequence& BlockManager::find(int64_t seq_id) const {
  const auto found = sequences_.find(seq_id);
  if (found == sequences_.end()) {
    refuse("seq_id", "be of a sequence that was added", std::to_string(seq_id));
  }
  return found->second;
}

void BlockManager::require_new(int64_t seq_id) const {
  if (contains(seq_id)) refuse("seq_id", "be new", std::to_string(seq_id) + ", which is in use");
}

void BlockManager::require_distinct(const std::vector<int64_t>& seq_ids) const {
  std::unordered_set<int64_t> seen;
  for (const int64_t seq_id : seq_ids) {
    find(seq_id);
    if (!seen.insert(seq_id).second) {
      refuse("seq_ids", "name each sequence once", std::to_string(seq_id) + " twice");
    }
  }
}

void BlockManager::require_free(int64_t needed) const {
  if (needed > num_free_blocks()) throw OutOfBlocks(needed, num_free_blocks());
}

int64_t BlockManager::blocks_to_append(const std::vector<int64_t>& seq_ids,
                                       int64_t num_tokens) const {
  int64_t needed = 0;
  std::unordered_map<int32_t, int32_t> writers;  // of shared blocks
  for (const int64_t seq_id : seq_ids) {
    const Sequence& sequence = find(seq_id);
    needed += blocks_for(sequence.length + num_tokens) - blocks_for(sequence.length);
    if (writes_shared_block(sequence)) ++writers[sequence.blocks.back()];
  }
  // Whoever writes last, when all others have left, keeps the block.
  for (const auto& [block, count] : writers) needed += std::min(count, ref_counts_[block] - 1);
  return needed;
}

bool BlockManager::writes_shared_block(const Sequence& sequence) const {
  return sequence.length % block_size_ != 0 && ref_counts_[sequence.blocks.back()] > 1;
}

int32_t BlockManager::take() {
  const int32_t block = free_.back();
  free_.pop_back();
  ref_counts_[block] = 1;
  return block;
}

void BlockManager::release(int32_t block) {
  if (--ref_counts_[block] == 0) free_.push_back(block);
}

}  // namespace paged_ops
