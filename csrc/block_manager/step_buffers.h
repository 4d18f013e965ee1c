// The index tensors of a step.
#pragma once

#include <cstdint>
#include <vector>

namespace paged_ops {

// One step of any kind; n sequences, t new tokens in all.
struct Batch {
  int64_t width = 0;                     // the most blocks that a sequence lists
  std::vector<int32_t> block_table;      // [n, width]; 0 past a sequence's last block
  std::vector<int32_t> seq_lens;         // [n]
  std::vector<int32_t> query_start_loc;  // [n + 1]
  std::vector<int64_t> slot_mapping;     // [t]
  std::vector<int64_t> positions;        // [t]
};

// Decode steps, one after the other in the same memory, the caller's: only what has changed is
// written. Rows that a step does not use have length 0, slot -1 and position 0, so that a captured
// graph may run them.
struct StepBuffers {
  struct Row {
    uint64_t stamp = 0;   // of the block list that it shows
    int64_t written = 0;  // how many blocks of it
  };

  int64_t max_rows;
  int64_t max_blocks;
  int32_t* block_table;   // [max_rows, max_blocks]
  int32_t* seq_lens;      // [max_rows]
  int64_t* slot_mapping;  // [max_rows]
  int64_t* positions;     // [max_rows]
  std::vector<Row> rows;  // max_rows of them
  int64_t num_rows;       // that are not clear; at first all

  void clear_from(int64_t row) {
    for (; num_rows > row; --num_rows) {
      seq_lens[num_rows - 1] = 0;
      slot_mapping[num_rows - 1] = -1;
      positions[num_rows - 1] = 0;
    }
  }
};

}  // namespace paged_ops
