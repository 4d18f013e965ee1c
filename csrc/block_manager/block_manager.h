// The blocks of a paged KV cache and the sequences that hold them: reference counts, fork with
// copy-on-write, and the index tensors of a step. C++17 alone: no torch, no Python.
//
// Every operation is all or nothing: one that raises has changed nothing. Not thread-safe.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace paged_ops {

// Too few free blocks. Nothing has changed; freeing sequences and trying again is safe.
class OutOfBlocks : public std::runtime_error {
 public:
  OutOfBlocks(int64_t needed_blocks, int64_t free_blocks);

  const int64_t needed;
  const int64_t free;
};

// A block whose content has to be copied before the next write to the cache.
struct BlockPair {
  int32_t source;
  int32_t destination;
};

// Where the tensors of one step are written; n sequences, t new tokens in all.
struct StepBuffers {
  int32_t* block_table;  // [n, max_blocks]; entries past a sequence's last block stay as they are
  int64_t max_blocks;    //
  int32_t* seq_lens;     // [n]
  int32_t* query_start_loc;  // [n + 1]
  int64_t* slot_mapping;     // [t]
  int64_t* positions;        // [t]
};

class BlockManager {
 public:
  BlockManager(int64_t num_blocks, int64_t block_size);

  // A new sequence of num_tokens >= 0 tokens, in as many blocks as they need.
  void allocate(int64_t seq_id, int64_t num_tokens);

  // Grows each sequence by num_tokens >= 1. A shared block that would be written is replaced by a
  // new one first: the pairs returned have to be copied before the new tokens are written.
  std::vector<BlockPair> append(const std::vector<int64_t>& seq_ids, int64_t num_tokens);

  // A new sequence with the tokens of another, sharing its blocks.
  void fork(int64_t parent_id, int64_t child_id);

  // Ends a sequence; blocks that no other sequence holds become free.
  void free(int64_t seq_id);

  // Describes a step in which the last num_new_tokens[i] tokens of sequence seq_ids[i] are new.
  void write_step(const std::vector<int64_t>& seq_ids, const std::vector<int64_t>& num_new_tokens,
                  const StepBuffers& buffers) const;

  int64_t num_blocks() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t block_size() const { return block_size_; }
  int64_t num_free_blocks() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }
  bool contains(int64_t seq_id) const { return sequences_.count(seq_id) > 0; }
  int64_t length(int64_t seq_id) const { return find(seq_id).length; }
  const std::vector<int32_t>& blocks(int64_t seq_id) const { return find(seq_id).blocks; }
  int32_t ref_count(int64_t block) const;
  int64_t blocks_for(int64_t num_tokens) const {
    return (num_tokens + block_size_ - 1) / block_size_;
  }

  // Verifies every invariant; raises std::logic_error where one is broken.
  void check() const;

 private:
  struct Sequence {
    std::vector<int32_t> blocks;  // blocks_for(length) of them
    int64_t length = 0;
  };

  const Sequence& find(int64_t seq_id) const;
  void require_new(int64_t seq_id) const;
  void require_distinct(const std::vector<int64_t>& seq_ids) const;
  void require_free(int64_t needed) const;
  int64_t blocks_to_append(const std::vector<int64_t>& seq_ids, int64_t num_tokens) const;
  bool writes_shared_block(const Sequence& sequence) const;
  int32_t take();
  void release(int32_t block);

  int64_t block_size_;
  std::vector<int32_t> ref_counts_;  // of each block; 0: free
  std::vector<int32_t> free_;        // a stack: what was freed last is still in the caches
  std::unordered_map<int64_t, Sequence> sequences_;
};

}  // namespace paged_ops
