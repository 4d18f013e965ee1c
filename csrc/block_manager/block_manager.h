// The blocks of a paged KV cache and the sequences that hold them: reference counts, fork with
// copy-on-write, prefix caching, and the index tensors of a step. C++17 alone: no torch, no Python.
//
// Every operation is all or nothing: one that raises, be it for want of memory, has changed
// nothing. Every public method locks the manager, so threads may share one; StepBuffers belong to
// one thread at a time.
#pragma once

#include <cstdint>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "block_pool.h"
#include "errors.h"
#include "prefix_cache.h"
#include "span.h"
#include "step_buffers.h"

namespace paged_ops {

// A block whose content has to be copied before the next write to the cache.
struct BlockPair {
  int32_t source;
  int32_t destination;
};

struct PrefixStatistics {
  int64_t shares = 0;            // calls of share
  int64_t tokens_asked = 0;      // tokens that they asked for
  int64_t tokens_found = 0;      // and of these, how many were cached
  int64_t blocks_published = 0;  // entered into the cache
  int64_t blocks_evicted = 0;    // taken out of it because no block was free
};

struct SequenceState {
  int64_t seq_id;
  int64_t length;
  int64_t published_blocks;
  std::vector<int32_t> blocks;
};

struct State {
  int64_t num_free_blocks;
  int64_t num_evictable_blocks;
  int64_t num_cached_blocks;
  int64_t num_pinned_blocks;
  PrefixStatistics prefix;
  std::vector<SequenceState> sequences;
};

using Ids = Span<const int64_t>;
using Tokens = Span<const int64_t>;

constexpr int64_t kLongest = std::numeric_limits<int32_t>::max();  // seq_lens are int32

class BlockManager {
 public:
  // No sequence may be longer than max_seq_len tokens. The watermark is how many blocks a new
  // sequence leaves for those that hold some.
  BlockManager(int64_t num_blocks, int64_t block_size, int64_t watermark, int64_t max_seq_len);

  // A new sequence of num_tokens >= 0 tokens, in as many blocks as they need.
  void allocate(int64_t seq_id, int64_t num_tokens);

  // Whether allocate would find enough blocks.
  bool can_allocate(int64_t num_tokens) const;

  // Grows each sequence by its number of tokens, at least 1. A shared block that would be written
  // is replaced by a new one first: the pairs have to be copied before the new tokens are written.
  std::vector<BlockPair> append(Ids seq_ids, Span<const int64_t> num_tokens);
  std::vector<BlockPair> append(Ids seq_ids, int64_t num_tokens);

  // Holds the blocks of the next num_tokens >= 1 tokens of each sequence, whose lengths stay.
  std::vector<BlockPair> reserve(Ids seq_ids, int64_t num_tokens);

  // Drops all but the first num_tokens tokens, and the blocks behind them, reserved ones too.
  void truncate(int64_t seq_id, int64_t num_tokens);

  // A new sequence with the tokens of another, sharing the blocks that they fill or begin to fill.
  void fork(int64_t parent_id, int64_t child_id);

  // Gives up the blocks of a sequence, which stays, empty. Returns the length that it had.
  int64_t preempt(int64_t seq_id);

  // Ends a sequence; blocks that nobody else holds become free, or evictable if they are cached.
  void free(int64_t seq_id);

  // How many of the first tokens are cached, in full blocks.
  int64_t lookup(Tokens tokens, int64_t salt) const;

  // Gives an empty sequence the cached blocks that begin its tokens; returns its new length.
  int64_t share(int64_t seq_id, Tokens tokens, int64_t salt);

  // Enters the full blocks of a sequence into the cache; tokens are its first tokens, whose keys
  // and values are written. Returns how many tokens are published, those of earlier calls included
  // (but where a prefix that was passed over is gone, of these tokens alone).
  int64_t publish(int64_t seq_id, Tokens tokens, int64_t salt);

  // Keeps the full blocks of tokens, all of which must be cached, until they are unpinned.
  int64_t pin(Tokens tokens, int64_t salt);
  int64_t unpin(Tokens tokens, int64_t salt);

  // Forgets every cached prefix, pins included. Sequences keep their blocks, all unpublished.
  void reset_prefix_cache();

  // Appends one token to each sequence and brings row i of the buffers up to seq_ids[i].
  std::vector<BlockPair> step(Ids seq_ids, StepBuffers* buffers);

  // Describes a step in which the last num_new_tokens[i] tokens of sequence seq_ids[i] are new. Of
  // what is reserved, blocks past max_blocks are not listed.
  Batch batch(Ids seq_ids, Span<const int64_t> num_new_tokens, int64_t max_blocks) const;

  int64_t num_blocks() const { return pool_.size(); }
  int64_t block_size() const { return block_size_; }
  int64_t watermark() const { return watermark_; }
  int64_t max_seq_len() const { return max_seq_len_; }
  int64_t blocks_for(int64_t num_tokens) const {
    return (num_tokens + block_size_ - 1) / block_size_;
  }
  int64_t num_free_blocks() const;
  int64_t num_evictable_blocks() const;
  int64_t num_sequences() const;
  bool contains(int64_t seq_id) const;
  int64_t length(int64_t seq_id) const;
  std::vector<int32_t> blocks(int64_t seq_id) const;
  int32_t ref_count(int64_t block) const;
  State state() const;

  // Verifies every invariant; raises std::logic_error where one is broken.
  void check() const;

 private:
  struct Sequence {
    int64_t seq_id = 0;
    int64_t length = 0;
    std::vector<int32_t> blocks;   // at least blocks_for(length); what is more is reserved
    uint64_t stamp = 0;            // changes when a block that was listed is so no more
    mutable uint64_t visit = 0;    // the call that named it last
    int64_t published_blocks = 0;  // the first so many are in the cache, or equal to such
    Chain chain;                   // where they end
    Chain passed;                  // where the last of them ends that is another's block
    int64_t salt = 0;              // that they were published with
  };

  // The private ones expect the lock to be held.
  using Lock = std::lock_guard<std::mutex>;
  int32_t slot_of(int64_t seq_id) const;
  const Sequence& find(int64_t seq_id) const { return slots_[slot_of(seq_id)]; }
  Sequence& find(int64_t seq_id) { return slots_[slot_of(seq_id)]; }
  Sequence& add(int64_t seq_id);
  void require_new(int64_t seq_id) const;
  void require_blocks(int64_t needed) const;
  int64_t kept_back() const;
  bool any_sequence_holds() const;

  void resolve(Ids seq_ids) const;
  void require_one_each(const char* argument, Span<const int64_t> numbers) const;
  void require_length(int64_t seq_id, int64_t length, int64_t num_tokens) const;
  std::vector<BlockPair> grow(Span<const int64_t> num_tokens);
  int64_t plan_growth(Span<const int64_t> num_tokens);
  bool writes_last_block(const Sequence& sequence) const;
  int32_t& last_written_block(Sequence* sequence) const;
  void own_last_block(Sequence* sequence, std::vector<BlockPair>* copies);
  void hold_blocks(Sequence* sequence, int64_t count);
  void drop_blocks(Sequence* sequence, int64_t kept);

  int32_t take();
  void forget(int32_t block);
  bool goes_on(const Sequence& sequence) const;
  bool publish_block(Sequence* sequence, const int64_t* tokens);
  std::vector<int32_t> match_all(Tokens tokens, int64_t salt) const;

  int64_t slot(const Sequence& sequence, int64_t position) const;
  void require_rows(const StepBuffers& buffers) const;
  void write_row(const Sequence& sequence, int64_t row, StepBuffers* buffers) const;
  void require_batch(Span<const int64_t> num_new_tokens, int64_t max_blocks) const;
  void check_sequences(std::vector<int32_t>* holders) const;

  const int64_t block_size_;
  const int64_t watermark_;
  const int64_t max_seq_len_;
  mutable std::mutex mutex_;
  BlockPool pool_;
  PrefixCache cache_;
  PrefixStatistics prefix_;
  std::unordered_map<int32_t, int32_t> pins_;      // how often each pinned block is
  std::unordered_map<int32_t, int32_t> pin_ends_;  // how many pins end with a block
  std::vector<Sequence> slots_;
  std::vector<int32_t> free_slots_;
  std::unordered_map<int64_t, int32_t> slot_of_;  // of each sequence
  mutable uint64_t visit_ = 0;
  mutable std::vector<int32_t> named_;  // slots of the sequences that the call names
  std::vector<int64_t> ones_;           // as many as the longest step
};

}  // namespace paged_ops
