// What the host keeps of a device: its limits, and counters that are 0 between calls.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "heuristics.h"

namespace paged_ops::cuda {

inline constexpr int kMaxDevices = 64;  // of a process

DeviceLimits device_limits(int device);

// `count` counters of the current device that are 0 and that no kernel uses which may run at the
// same time as one on `stream`: those of the stream, or, while a graph is being captured, ones that
// are never handed out again, because the graph can be replayed beside anything. Each captured call
// so keeps some KB for good.
unsigned* zeroed_counters(size_t count, int device, cudaStream_t stream);

}  // namespace paged_ops::cuda
