// The CUDA launchers, one for each operator. Each enqueues its work on `stream` and returns at
// once; what they are given has been checked. A launch that fails raises std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "heuristics.h"

namespace paged_ops::cuda {

// How an attention call is computed, and the memory that it needs meanwhile.
struct AttentionPlan {
  bool on_matrix_units;
  DeviceLimits limits;
  DecodePlan decode;
  int64_t cells;  // of the PieceStore
  int splits;     // of the SplitStore, without matrix units
  size_t scratch_bytes;
  size_t num_counters;
};

struct Scratch {
  void* memory;        // scratch_bytes, 16-byte aligned, of any contents
  unsigned* counters;  // num_counters, all 0; left so
};

AttentionPlan plan_attention(const AttentionParams& params, const DeviceLimits& limits);
void run_attention(const AttentionParams& params, const AttentionPlan& plan, const Scratch& scratch,
                   cudaStream_t stream);
void run_write_kv(const WriteKvParams& params, cudaStream_t stream);
void run_copy_blocks(const CopyBlocksParams& params, cudaStream_t stream);
void run_merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace paged_ops::cuda
