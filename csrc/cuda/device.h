// What the host keeps of a device: its limits, counters that are 0 between calls, scratch memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "heuristics.h"

namespace paged_ops::cuda {

inline constexpr int kMaxDevices = 64;  // of a process

DeviceLimits device_limits(int device);

// Whether what is enqueued on the stream becomes part of a graph.
bool is_capturing(cudaStream_t stream);

// `count` counters of the current device that are 0 and that no kernel uses which may run at the
// same time as one on `stream`: those of the stream, or, while a graph is being captured, ones that
// are never handed out again, because the graph can be replayed beside anything. Each captured call
// so keeps some KB for good.
unsigned* zeroed_counters(size_t count, int device, cudaStream_t stream, bool capturing);

// Memory of the current device for the kernels of one stream, of any contents, 256-byte aligned. It
// is kept for the next call, which saves the host an allocation. nullptr where torch's allocator
// has to be asked: for much memory, when little is left, and while a graph is being captured, which
// needs its own.
void* stream_memory(size_t bytes, int device, cudaStream_t stream, bool capturing);

}  // namespace paged_ops::cuda
