#include "block_manager.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

namespace paged_ops {
namespace {

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max() - 1;
constexpr int64_t kLargestBlock = int64_t{1} << 20;

// No two block lists have the same one, of whichever manager: StepBuffers may serve several.
uint64_t new_stamp() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

int64_t checked_size(const char* argument, int64_t largest, int64_t value) {
  require_at_least(argument, 1, value);
  require_at_most(argument, largest, value);
  return value;
}

int64_t checked_watermark(int64_t num_blocks, int64_t value) {
  require_at_least("watermark", 0, value);
  require_at_most("watermark", num_blocks, value);
  return value;
}

}  // namespace

BlockManager::BlockManager(int64_t num_blocks, int64_t block_size, int64_t watermark,
                           int64_t max_seq_len)
    : block_size_(checked_size("block_size", kLargestBlock, block_size)),
      watermark_(checked_watermark(checked_size("num_blocks", kMostBlocks, num_blocks), watermark)),
      max_seq_len_(checked_size("max_seq_len", kLongest, max_seq_len)),
      pool_(num_blocks),
      cache_(num_blocks, block_size) {}

void BlockManager::allocate(int64_t seq_id, int64_t num_tokens) {
  const Lock lock(mutex_);
  require_new(seq_id);
  require_at_least("num_tokens", 0, num_tokens);
  require_length(seq_id, 0, num_tokens);
  const int64_t needed = blocks_for(num_tokens);
  require_blocks(needed + kept_back());
  std::vector<int32_t> blocks;
  blocks.reserve(needed);
  Sequence& sequence = add(seq_id);
  sequence.blocks = std::move(blocks);
  sequence.length = num_tokens;
  for (int64_t i = 0; i < needed; ++i) sequence.blocks.push_back(take());
}

bool BlockManager::can_allocate(int64_t num_tokens) const {
  const Lock lock(mutex_);
  require_at_least("num_tokens", 0, num_tokens);
  const int64_t available = pool_.num_free() + pool_.num_evictable() - kept_back();
  return num_tokens <= max_seq_len_ && blocks_for(num_tokens) <= available;
}

std::vector<BlockPair> BlockManager::append(Ids seq_ids, Span<const int64_t> num_tokens) {
  const Lock lock(mutex_);
  resolve(seq_ids);
  std::vector<BlockPair> copies = grow(num_tokens);
  for (size_t i = 0; i < named_.size(); ++i) slots_[named_[i]].length += num_tokens[i];
  return copies;
}

std::vector<BlockPair> BlockManager::append(Ids seq_ids, int64_t num_tokens) {
  require_at_least("num_tokens", 1, num_tokens);
  const std::vector<int64_t> each(seq_ids.size, num_tokens);
  return append(seq_ids, {each.data(), seq_ids.size});
}

std::vector<BlockPair> BlockManager::reserve(Ids seq_ids, int64_t num_tokens) {
  require_at_least("num_tokens", 1, num_tokens);
  const Lock lock(mutex_);
  resolve(seq_ids);
  const std::vector<int64_t> each(seq_ids.size, num_tokens);
  const Span<const int64_t> growth{each.data(), seq_ids.size};
  return grow(growth);
}

void BlockManager::truncate(int64_t seq_id, int64_t num_tokens) {
  const Lock lock(mutex_);
  Sequence& sequence = find(seq_id);
  require_at_least("num_tokens", 0, num_tokens);
  require_at_most("num_tokens", sequence.length, num_tokens);
  drop_blocks(&sequence, blocks_for(num_tokens));
  sequence.length = num_tokens;
  if (num_tokens / block_size_ < sequence.published_blocks) {
    sequence.published_blocks = 0;  // the next publish follows the cache from the start
  }
}

void BlockManager::fork(int64_t parent_id, int64_t child_id) {
  const Lock lock(mutex_);
  Sequence copy = find(parent_id);
  require_new(child_id);
  copy.blocks.resize(blocks_for(copy.length));
  Sequence& child = add(child_id);
  copy.seq_id = child_id;
  copy.stamp = child.stamp;
  child = std::move(copy);
  for (const int32_t block : child.blocks) pool_.hold(block);
}

int64_t BlockManager::preempt(int64_t seq_id) {
  const Lock lock(mutex_);
  Sequence& sequence = find(seq_id);
  const int64_t length = sequence.length;
  drop_blocks(&sequence, 0);
  sequence.length = 0;
  sequence.published_blocks = 0;
  return length;
}

void BlockManager::free(int64_t seq_id) {
  const Lock lock(mutex_);
  const int32_t slot = slot_of(seq_id);
  free_slots_.push_back(slot);
  drop_blocks(&slots_[slot], 0);
  slots_[slot] = {};
  slot_of_.erase(seq_id);
}

int64_t BlockManager::num_free_blocks() const {
  const Lock lock(mutex_);
  return pool_.num_free();
}

int64_t BlockManager::num_evictable_blocks() const {
  const Lock lock(mutex_);
  return pool_.num_evictable();
}

int64_t BlockManager::num_sequences() const {
  const Lock lock(mutex_);
  return static_cast<int64_t>(slot_of_.size());
}

bool BlockManager::contains(int64_t seq_id) const {
  const Lock lock(mutex_);
  return slot_of_.count(seq_id) > 0;
}

int64_t BlockManager::length(int64_t seq_id) const {
  const Lock lock(mutex_);
  return find(seq_id).length;
}

std::vector<int32_t> BlockManager::blocks(int64_t seq_id) const {
  const Lock lock(mutex_);
  return find(seq_id).blocks;
}

int32_t BlockManager::ref_count(int64_t block) const {
  const Lock lock(mutex_);
  if (block < 0 || block >= pool_.size()) {
    refuse("block", "be from 0 to " + std::to_string(pool_.size() - 1), std::to_string(block));
  }
  return pool_.holders(static_cast<int32_t>(block));
}

int32_t BlockManager::slot_of(int64_t seq_id) const {
  const auto found = slot_of_.find(seq_id);
  if (found == slot_of_.end()) {
    refuse("seq_id", "be of a sequence that was added", std::to_string(seq_id));
  }
  return found->second;
}

BlockManager::Sequence& BlockManager::add(int64_t seq_id) {
  const bool is_new = free_slots_.empty();
  const int32_t slot = is_new ? static_cast<int32_t>(slots_.size()) : free_slots_.back();
  if (is_new && slots_.size() == slots_.capacity()) {
    slots_.reserve(std::max<size_t>(2 * slots_.size(), 1));
  }
  slot_of_.emplace(seq_id, slot);  // the last that can fail
  if (is_new) {
    slots_.emplace_back();
  } else {
    free_slots_.pop_back();
  }
  slots_[slot].seq_id = seq_id;
  slots_[slot].stamp = new_stamp();
  return slots_[slot];
}

void BlockManager::require_new(int64_t seq_id) const {
  if (slot_of_.count(seq_id) > 0) {
    refuse("seq_id", "be new", std::to_string(seq_id) + ", which is in use");
  }
}

void BlockManager::require_blocks(int64_t needed) const {
  if (needed > pool_.num_free() + pool_.num_evictable()) {
    throw OutOfBlocks(needed, pool_.num_free(), pool_.num_evictable());
  }
}

// While no sequence holds blocks, none is there to grow, and a new one may need them all.
int64_t BlockManager::kept_back() const { return any_sequence_holds() ? watermark_ : 0; }

bool BlockManager::any_sequence_holds() const {
  const int64_t held = pool_.size() - pool_.num_free() - pool_.num_evictable();
  if (held > static_cast<int64_t>(pins_.size())) return true;
  return std::any_of(pins_.begin(), pins_.end(),
                     [&](const auto& pin) { return pool_.holders(pin.first) > pin.second; });
}

void BlockManager::resolve(Ids seq_ids) const {
  ++visit_;
  named_.clear();
  for (const int64_t seq_id : seq_ids) {
    const int32_t slot = slot_of(seq_id);
    if (slots_[slot].visit == visit_) {
      refuse("seq_ids", "name each sequence once", std::to_string(seq_id) + " twice");
    }
    slots_[slot].visit = visit_;
    named_.push_back(slot);
  }
}

// Holds the blocks of so many more tokens of each sequence that the call names. All that can fail
// comes first.
std::vector<BlockPair> BlockManager::grow(Span<const int64_t> num_tokens) {
  std::vector<BlockPair> copies;
  copies.reserve(plan_growth(num_tokens));
  for (size_t i = 0; i < named_.size(); ++i) {
    Sequence& sequence = slots_[named_[i]];
    if (writes_last_block(sequence)) own_last_block(&sequence, &copies);
    hold_blocks(&sequence, blocks_for(sequence.length + num_tokens[i]));
  }
  return copies;
}

// Refuses numbers that are wrong or too large, then reserves the memory of the lists: only for
// blocks that exist. Returns how many blocks will be copied.
int64_t BlockManager::plan_growth(Span<const int64_t> num_tokens) {
  require_one_each("num_tokens", num_tokens);
  int64_t num_new = 0, num_copies = 0;
  std::unordered_map<int32_t, int32_t> writers;  // of shared blocks
  // Lists, and the room that they need.
  std::vector<std::pair<std::vector<int32_t>*, int64_t>> too_short;
  for (size_t i = 0; i < named_.size(); ++i) {
    Sequence& sequence = slots_[named_[i]];
    require_at_least("num_tokens", 1, num_tokens[i]);
    require_length(sequence.seq_id, sequence.length, num_tokens[i]);
    const int64_t wanted = blocks_for(sequence.length + num_tokens[i]);
    const int64_t held = static_cast<int64_t>(sequence.blocks.size());
    if (wanted > held) num_new += wanted - held;
    if (wanted > static_cast<int64_t>(sequence.blocks.capacity())) {
      too_short.emplace_back(&sequence.blocks, std::max(wanted, 2 * held));
    }
    if (writes_last_block(sequence)) {
      const int32_t block = last_written_block(&sequence);
      if (pool_.holders(block) > 1) ++writers[block];
    }
  }
  // Whoever writes last, when all others have left, keeps the block.
  for (const auto& [block, count] : writers) {
    num_copies += std::min(count, pool_.holders(block) - 1);
  }
  require_blocks(num_new + num_copies);
  for (const auto& [list, size] : too_short) list->reserve(size);
  return num_copies;
}

void BlockManager::require_one_each(const char* argument, Span<const int64_t> numbers) const {
  if (numbers.size != static_cast<int64_t>(named_.size())) {
    refuse(argument,
           "have one entry for each of the " + std::to_string(named_.size()) + " sequences",
           std::to_string(numbers.size));
  }
}

void BlockManager::require_length(int64_t seq_id, int64_t length, int64_t num_tokens) const {
  if (num_tokens > max_seq_len_ - length) {
    refuse("sequence " + std::to_string(seq_id),
           "have at most max_seq_len=" + std::to_string(max_seq_len_) + " tokens",
           std::to_string(static_cast<uint64_t>(length) + static_cast<uint64_t>(num_tokens)));
  }
}

// Whether the next token goes to a block that holds tokens already.
bool BlockManager::writes_last_block(const Sequence& sequence) const {
  return sequence.length % block_size_ != 0;
}

int32_t& BlockManager::last_written_block(Sequence* sequence) const {
  return sequence->blocks[sequence->length / block_size_];
}

// Makes it safe to write where the last token lies: for the others that hold the block, and for the
// prefix cache, which a truncated sequence may have published it to.
void BlockManager::own_last_block(Sequence* sequence, std::vector<BlockPair>* copies) {
  int32_t& block = last_written_block(sequence);
  if (pool_.holders(block) > 1) {
    const int32_t own = take();
    copies->push_back({block, own});
    pool_.release(block);
    block = own;
    sequence->stamp = new_stamp();
  } else if (pool_.is_cached(block)) {
    forget(block);
  }
}

void BlockManager::hold_blocks(Sequence* sequence, int64_t count) {
  while (static_cast<int64_t>(sequence->blocks.size()) < count) sequence->blocks.push_back(take());
}

// From the back: then the first block is on top of the free list again, and of a cached prefix the
// end is evicted before what it follows.
void BlockManager::drop_blocks(Sequence* sequence, int64_t kept) {
  std::vector<int32_t>& blocks = sequence->blocks;
  if (static_cast<int64_t>(blocks.size()) <= kept) return;
  for (auto block = blocks.rbegin(); block != blocks.rend() - kept; ++block) pool_.release(*block);
  blocks.resize(kept);
  sequence->stamp = new_stamp();
}

int32_t BlockManager::take() {
  if (pool_.num_free() == 0) {
    forget(pool_.least_recently_used());
    ++prefix_.blocks_evicted;
  }
  return pool_.take();
}

void BlockManager::forget(int32_t block) {
  cache_.erase(block);
  pool_.set_cached(block, false);
}

}  // namespace paged_ops
