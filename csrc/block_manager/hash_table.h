// From 128-bit hashes to blocks: open addressing with linear probing, at most half full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paged_ops {

struct Hash128 {
  uint64_t low = 0;
  uint64_t high = 0;

  bool operator==(const Hash128& other) const { return low == other.low && high == other.high; }
};

class HashTable {
 public:
  HashTable() : slots_(kSmallest) {}

  // The block of a hash, or -1.
  int32_t find(const Hash128& hash) const { return slots_[slot_of(hash)].block; }

  // Room for so many hashes in all.
  void reserve(int64_t size) {
    size_t num_slots = slots_.size();
    while (2 * size > static_cast<int64_t>(num_slots)) num_slots *= 2;
    if (num_slots > slots_.size()) grow(num_slots);
  }

  // The hash must be new, and there must be room.
  void insert(const Hash128& hash, int32_t block) {
    slots_[slot_of(hash)] = {hash, block};
    ++size_;
  }

  // The hash must be there. Moves up what was displaced by it, so that no tombstones gather.
  void erase(const Hash128& hash) {
    size_t hole = slot_of(hash);
    for (size_t i = next(hole); slots_[i].block >= 0; i = next(i)) {
      const size_t wanted = home(slots_[i].hash);
      const bool may_move = ((i - wanted) & mask()) >= ((i - hole) & mask());
      if (may_move) {
        slots_[hole] = slots_[i];
        hole = i;
      }
    }
    slots_[hole] = {};
    --size_;
  }

  int64_t size() const { return size_; }

 private:
  struct Slot {
    Hash128 hash;
    int32_t block = -1;
  };
  static constexpr size_t kSmallest = 64;

  size_t mask() const { return slots_.size() - 1; }
  size_t home(const Hash128& hash) const { return hash.low & mask(); }
  size_t next(size_t i) const { return (i + 1) & mask(); }

  // Where the hash is, or would be.
  size_t slot_of(const Hash128& hash) const {
    size_t i = home(hash);
    while (slots_[i].block >= 0 && !(slots_[i].hash == hash)) i = next(i);
    return i;
  }

  void grow(size_t num_slots) {
    std::vector<Slot> old(num_slots);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.block >= 0) slots_[slot_of(slot.hash)] = slot;
    }
  }

  std::vector<Slot> slots_;  // a power of two of them
  int64_t size_ = 0;
};

}  // namespace paged_ops
