// The CPU kernels as a table: one table for each instruction set that is built, chosen once.
#pragma once

#include "../params.h"

namespace paged_ops::cpu {

struct Kernels {
  const char* name;
  void (*attention)(const AttentionParams&);
  void (*write_kv)(const WriteKvParams&);
  void (*copy_blocks)(const CopyBlocksParams&);
  void (*merge_states)(const MergeStatesParams&);
};

}  // namespace paged_ops::cpu
