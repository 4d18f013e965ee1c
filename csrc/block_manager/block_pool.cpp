#include "block_pool.h"

#include "errors.h"

namespace paged_ops {

BlockPool::BlockPool(int64_t num_blocks) : blocks_(num_blocks + 1), num_free_(num_blocks) {
  const int32_t ring = static_cast<int32_t>(num_blocks);
  for (int32_t i = 0; i < ring; ++i) blocks_[i].next = i + 1;
  blocks_[ring].previous = blocks_[ring].next = ring;
}

int32_t BlockPool::take() {
  const int32_t block = first_free_;
  first_free_ = blocks_[block].next;
  --num_free_;
  blocks_[block].holders = 1;
  return block;
}

void BlockPool::hold(int32_t block) {
  if (blocks_[block].holders++ == 0) unlink_evictable(block);
}

void BlockPool::release(int32_t block) {
  Block& released = blocks_[block];
  if (--released.holders > 0) return;
  if (released.cached) {
    link_evictable(block);
  } else {
    push_free(block);
  }
}

void BlockPool::set_cached(int32_t block, bool cached) {
  Block& changed = blocks_[block];
  if (changed.holders == 0 && changed.cached && !cached) {
    unlink_evictable(block);
    push_free(block);
  }
  changed.cached = cached;
}

void BlockPool::push_free(int32_t block) {
  blocks_[block].next = first_free_;
  first_free_ = block;
  ++num_free_;
}

void BlockPool::link_evictable(int32_t block) {
  const int32_t ring = static_cast<int32_t>(size());
  const int32_t newest = blocks_[ring].previous;
  blocks_[block].previous = newest;
  blocks_[block].next = ring;
  blocks_[newest].next = block;
  blocks_[ring].previous = block;
  ++num_evictable_;
}

void BlockPool::unlink_evictable(int32_t block) {
  const Block& unlinked = blocks_[block];
  blocks_[unlinked.previous].next = unlinked.next;
  blocks_[unlinked.next].previous = unlinked.previous;
  --num_evictable_;
}

void BlockPool::check() const {
  std::vector<bool> seen(size(), false);
  require_invariant(check_free(&seen) == num_free_, "the free blocks are counted");
  require_invariant(check_evictable(&seen) == num_evictable_, "the evictable blocks are counted");
  for (int64_t i = 0; i < size(); ++i) {
    require_invariant(seen[i] == (blocks_[i].holders == 0),
                      "a block is either held, or once in a list");
  }
}

int64_t BlockPool::check_free(std::vector<bool>* seen) const {
  int64_t count = 0;
  for (int32_t block = first_free_; count < num_free_; block = blocks_[block].next, ++count) {
    require_invariant(block >= 0 && block < size(), "the free list names blocks");
    require_invariant(!(*seen)[block] && !blocks_[block].cached, "a free block is not cached");
    (*seen)[block] = true;
  }
  return count;
}

int64_t BlockPool::check_evictable(std::vector<bool>* seen) const {
  int64_t count = 0;
  int32_t before = static_cast<int32_t>(size());
  for (int32_t block = blocks_[before].next; block != size(); block = blocks_[block].next) {
    require_invariant(blocks_[block].previous == before, "evictable blocks are linked both ways");
    require_invariant(!(*seen)[block] && blocks_[block].cached, "an evictable block is cached");
    (*seen)[block] = true;
    before = block;
    ++count;
  }
  return count;
}

}  // namespace paged_ops
