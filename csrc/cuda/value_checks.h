// Checks of values that lie on the device: opt-in, by PAGED_OPS_CHECK=1 in the environment when the
// first operator runs. Without it these functions return at once, and values out of range are
// undefined behaviour.
//
// Each enqueues a kernel of its own before the operator's, which prints one line for a wrong value
// and traps: the operator's kernel then never runs, and the error arrives at the next synchronising
// call. Nothing waits and nothing is read back, so the checks can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"

namespace paged_ops::cuda {

// Lengths, query_start_loc and the block ids that the visible keys need.
void check_values(const AttentionParams& params, cudaStream_t stream);
// Slots.
void check_values(const WriteKvParams& params, cudaStream_t stream);
// Block ids.
void check_values(const CopyBlocksParams& params, cudaStream_t stream);

}  // namespace paged_ops::cuda
