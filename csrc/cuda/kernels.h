// The CUDA launchers, one for each operator. Each enqueues its work on `stream` and returns at
// once; what they are given has been checked. A launch that fails raises std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"

namespace paged_ops::cuda {

void run_attention(const AttentionParams& params, cudaStream_t stream);
void run_write_kv(const WriteKvParams& params, cudaStream_t stream);
void run_copy_blocks(const CopyBlocksParams& params, cudaStream_t stream);
void run_merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace paged_ops::cuda
