// Full blocks by what precedes and fills them: which block already holds the keys and values of
// these tokens after that prefix.
//
// A block's hash is chained: it covers the salt and all tokens up to the block's end. A hit
// compares the tokens themselves, and that the block before is the very one which this one was
// published after; so a collision of hashes costs a hit and never serves other tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hash_table.h"
#include "span.h"

namespace paged_ops {

// How far a prefix has been followed.
struct Chain {
  Hash128 hash;        // of the salt and all tokens so far
  uint64_t last = 0;   // the entry it ends with; before the first block, the salt
  int32_t block = -1;  // whose entry that is, or was
};

class PrefixCache {
 public:
  PrefixCache(int64_t num_blocks, int64_t block_size);

  // The empty prefix. Salts, at least 0, separate prefixes of equal tokens.
  static Chain begin(int64_t salt);

  // The blocks that hold the full blocks of tokens after the chain, up to the first that is in no
  // block; the chain then ends with the last of them.
  std::vector<int32_t> match(Span<const int64_t> tokens, Chain* chain) const;

  // Where a block of tokens after the chain is, or would be.
  struct Place {
    Hash128 hash;
    int32_t block;  // of this hash, or -1
    bool equal;     // and it holds these tokens after this chain
  };
  Place find(const int64_t* tokens, const Chain& chain) const;

  // Room for these blocks: entering them cannot fail.
  void reserve(const int32_t* blocks, int64_t count);

  // Enters a block of tokens after the chain, which then ends with it. Its hash must be new, and
  // there must be room.
  void insert(int32_t block, const int64_t* tokens, Hash128 hash, Chain* chain);
  void erase(int32_t block);

  // The chain that ends with an entered block.
  Chain ending_with(int32_t block) const;

  // Whether the entry that the chain ends with is still there; an empty one ends with none.
  bool has_end(const Chain& chain) const {
    return chain.block < 0 || entry(chain.block).id == chain.last;
  }

  int64_t size() const { return table_.size(); }

  // Verifies that the table leads to each entered block; raises std::logic_error.
  void check(int32_t block) const;

 private:
  struct Entry {
    Hash128 hash;
    uint64_t id = 0;        // never used again: tells a block from those that it held before
    uint64_t previous = 0;  // id of the entry before, or the salt
    int32_t next = -1;      // the block last entered after this one: most likely the next hit too
  };
  // Memory for what few blocks of a large pool may ever need.
  struct Chunk {
    std::vector<Entry> entries;
    std::unique_ptr<int64_t[]> tokens;  // not initialized: the system maps what is written alone
  };

  Hash128 extend(Hash128 hash, const int64_t* tokens) const;
  Entry& entry(int32_t block);
  const Entry& entry(int32_t block) const;
  int64_t* tokens_of(int32_t block) const;
  bool holds(int32_t block, const int64_t* tokens, uint64_t previous) const;

  int64_t block_size_;
  int64_t num_blocks_;
  std::vector<uint64_t> keys_;  // of the hash, one for each two places in a block
  std::vector<Chunk> chunks_;
  HashTable table_;
  uint64_t next_id_;
};

}  // namespace paged_ops
