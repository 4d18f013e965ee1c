// What the block manager raises: std::invalid_argument for what was asked wrongly, OutOfBlocks, and
// std::logic_error where an invariant of its own is broken.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace paged_ops {

// Too few blocks. Nothing has changed; freeing sequences and trying again is safe.
class OutOfBlocks : public std::runtime_error {
 public:
  OutOfBlocks(int64_t needed_blocks, int64_t free_blocks, int64_t evictable_blocks)
      : std::runtime_error("out of blocks: " + std::to_string(needed_blocks) + " needed, " +
                           std::to_string(free_blocks) + " free and " +
                           std::to_string(evictable_blocks) + " evictable"),
        needed(needed_blocks),
        free(free_blocks),
        evictable(evictable_blocks) {}

  const int64_t needed;  // the watermark included, where it applies
  const int64_t free;
  const int64_t evictable;  // kept for the prefix cache alone; taken when none is free
};

[[noreturn]] inline void refuse(const std::string& argument, const std::string& expected,
                                const std::string& got) {
  throw std::invalid_argument(argument + " must " + expected + ", got " + got);
}

inline void require_at_least(const char* argument, int64_t smallest, int64_t value) {
  if (value < smallest) {
    refuse(argument, "be at least " + std::to_string(smallest), std::to_string(value));
  }
}

inline void require_at_most(const char* argument, int64_t largest, int64_t value) {
  if (value > largest) {
    refuse(argument, "be at most " + std::to_string(largest), std::to_string(value));
  }
}

inline void require_invariant(bool holds, const char* what) {
  if (!holds) {
    throw std::logic_error(std::string("BlockManager: broken invariant: ") + what +
                           "; please report this");
  }
}

}  // namespace paged_ops
