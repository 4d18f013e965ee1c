// The index tensors of a step.
#include <algorithm>
#include <string>

#include "block_manager.h"

namespace paged_ops {

std::vector<BlockPair> BlockManager::step(Ids seq_ids, StepBuffers* buffers) {
  const Lock lock(mutex_);
  resolve(seq_ids);
  require_rows(*buffers);
  ones_.resize(seq_ids.size, 1);
  const Span<const int64_t> one_each{ones_.data(), seq_ids.size};
  std::vector<BlockPair> copies = grow(one_each);
  for (int64_t row = 0; row < seq_ids.size; ++row) {
    Sequence& sequence = slots_[named_[row]];
    write_row(sequence, row, buffers);
    ++sequence.length;
  }
  buffers->num_rows = std::max(buffers->num_rows, seq_ids.size);
  buffers->clear_from(seq_ids.size);
  return copies;
}

// Row of a sequence that is about to have one more token.
void BlockManager::write_row(const Sequence& sequence, int64_t row, StepBuffers* buffers) const {
  StepBuffers::Row& shown = buffers->rows[row];
  const int64_t held = std::min(static_cast<int64_t>(sequence.blocks.size()), buffers->max_blocks);
  if (shown.stamp != sequence.stamp) shown = {sequence.stamp, 0};
  int32_t* const entries = buffers->block_table + row * buffers->max_blocks;
  for (; shown.written < held; ++shown.written) {
    entries[shown.written] = sequence.blocks[shown.written];
  }
  const int64_t position = sequence.length;
  buffers->seq_lens[row] = static_cast<int32_t>(position + 1);
  buffers->slot_mapping[row] = slot(sequence, position);
  buffers->positions[row] = position;
}

void BlockManager::require_rows(const StepBuffers& buffers) const {
  require_at_most("the number of seq_ids", buffers.max_rows, static_cast<int64_t>(named_.size()));
  for (const int32_t slot : named_) {
    const Sequence& sequence = slots_[slot];
    require_length(sequence.seq_id, sequence.length, 1);
    if (blocks_for(sequence.length + 1) > buffers.max_blocks) {
      refuse("block_table",
             "have columns for the " + std::to_string(blocks_for(sequence.length + 1)) +
                 " blocks of sequence " + std::to_string(sequence.seq_id),
             std::to_string(buffers.max_blocks));
    }
  }
}

Batch BlockManager::batch(Ids seq_ids, Span<const int64_t> num_new_tokens,
                          int64_t max_blocks) const {
  const Lock lock(mutex_);
  resolve(seq_ids);
  require_batch(num_new_tokens, max_blocks);
  Batch batch;
  for (const int32_t slot : named_) {
    const int64_t listed = static_cast<int64_t>(slots_[slot].blocks.size());
    batch.width = std::max(batch.width, std::min(listed, max_blocks));
  }
  batch.block_table.resize(seq_ids.size * batch.width);
  batch.query_start_loc.push_back(0);
  for (int64_t i = 0; i < seq_ids.size; ++i) {
    const Sequence& sequence = slots_[named_[i]];
    const int64_t listed = std::min(static_cast<int64_t>(sequence.blocks.size()), batch.width);
    std::copy_n(sequence.blocks.begin(), listed, batch.block_table.begin() + i * batch.width);
    batch.seq_lens.push_back(static_cast<int32_t>(sequence.length));
    for (int64_t position = sequence.length - num_new_tokens[i]; position < sequence.length;
         ++position) {
      batch.slot_mapping.push_back(slot(sequence, position));
      batch.positions.push_back(position);
    }
    batch.query_start_loc.push_back(static_cast<int32_t>(batch.positions.size()));
  }
  return batch;
}

int64_t BlockManager::slot(const Sequence& sequence, int64_t position) const {
  const int64_t block = sequence.blocks[position / block_size_];
  return block * block_size_ + position % block_size_;
}

void BlockManager::require_batch(Span<const int64_t> num_new_tokens, int64_t max_blocks) const {
  require_one_each("num_new_tokens", num_new_tokens);
  for (size_t i = 0; i < named_.size(); ++i) {
    const Sequence& sequence = slots_[named_[i]];
    if (num_new_tokens[i] < 0 || num_new_tokens[i] > sequence.length) {
      refuse("num_new_tokens",
             "be from 0 to the length " + std::to_string(sequence.length) + " of sequence " +
                 std::to_string(sequence.seq_id),
             std::to_string(num_new_tokens[i]));
    }
    if (blocks_for(sequence.length) > max_blocks) {
      refuse("max_blocks",
             "hold the " + std::to_string(blocks_for(sequence.length)) + " blocks of sequence " +
                 std::to_string(sequence.seq_id),
             std::to_string(max_blocks));
    }
  }
}

}  // namespace paged_ops
