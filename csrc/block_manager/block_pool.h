// Which blocks are held, and in which order the others are taken: free ones first, then those that
// only the prefix cache still wants, least recently used first. Every operation is O(1).
#pragma once

#include <cstdint>
#include <vector>

namespace paged_ops {

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  // A free block, now held once. There must be one.
  int32_t take();

  // Once more; a block that nobody held is no longer free or evictable.
  void hold(int32_t block);

  // Once less; a block that nobody holds any more is evictable if cached, else free.
  void release(int32_t block);

  // Whether the prefix cache wants the block. One that nobody holds changes lists.
  void set_cached(int32_t block, bool cached);

  // The evictable block that has been so for the longest time. There must be one.
  int32_t least_recently_used() const { return blocks_.back().next; }

  int64_t size() const { return static_cast<int64_t>(blocks_.size()) - 1; }
  int64_t num_free() const { return num_free_; }
  int64_t num_evictable() const { return num_evictable_; }
  int32_t holders(int32_t block) const { return blocks_[block].holders; }
  bool is_cached(int32_t block) const { return blocks_[block].cached; }

  // Verifies both lists; raises std::logic_error.
  void check() const;

 private:
  struct Block {
    int32_t holders = 0;
    int32_t previous = 0;  // of evictable blocks: the one released before
    int32_t next = 0;      // of evictable blocks: the one released after; of free ones: below
    bool cached = false;
  };

  void push_free(int32_t block);
  void link_evictable(int32_t block);
  void unlink_evictable(int32_t block);
  int64_t check_free(std::vector<bool>* seen) const;
  int64_t check_evictable(std::vector<bool>* seen) const;

  std::vector<Block> blocks_;  // and one more: both ends of the ring of evictable blocks
  int32_t first_free_ = 0;     // a stack: what was freed last is still in the processor's caches
  int64_t num_free_ = 0;
  int64_t num_evictable_ = 0;
};

}  // namespace paged_ops
