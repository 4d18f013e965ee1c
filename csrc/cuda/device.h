// What the host keeps of a device: its limits, counters that are 0 between calls, scratch memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "heuristics.h"
#include "kernels.h"

namespace paged_ops::cuda {

inline constexpr int kMaxDevices = 64;  // of a process

DeviceLimits device_limits(int device);

// Scratch memory on the current device for the kernels of one call on `stream`, kept for the next
// call, which saves the host an allocation. The counters are 0, and no kernel uses them that may
// run at the same time: while a graph is being captured they are ones that are never handed out
// again, because the graph can be replayed beside anything. Each captured call so keeps some KB for
// good, in the batch-invariant mode up to 140 on 132 multiprocessors. `memory` is nullptr where
// torch's allocator has to be asked: for much memory, when little is left, and while a graph is
// being captured, which needs its own.
Scratch kept_scratch(size_t bytes, size_t num_counters, int device, cudaStream_t stream);

}  // namespace paged_ops::cuda
