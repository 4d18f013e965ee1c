#include "device.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "launch.h"

namespace paged_ops::cuda {
namespace {

constexpr size_t kArenaCounters = 1 << 20;
// Bytes of scratch memory for a call. In the batch-invariant mode, 8 KV heads of 128 bfloat16 in
// groups of 4 take up to 71 MB on 132 multiprocessors, groups of 8 up to 143.
constexpr size_t kMostKept = 160 << 20;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  require_success("attention", cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Allocates at any time: a capture that another call would break goes on.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// nullptr when little is left.
void* new_memory(size_t bytes) {
  const Relaxed relaxed;
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

unsigned* new_zeros(size_t count) {
  const Relaxed relaxed;
  void* memory = nullptr;
  cudaStream_t stream = nullptr;
  const size_t bytes = count * sizeof(unsigned);
  require_success("attention", cudaMalloc(&memory, bytes));
  require_success("attention", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  require_success("attention", cudaMemsetAsync(memory, 0, bytes, stream));
  require_success("attention", cudaStreamSynchronize(stream));
  require_success("attention", cudaStreamDestroy(stream));
  return static_cast<unsigned*>(memory);
}

// What the kernels of a stream use one after the other.
struct Kept {
  void* memory = nullptr;
  size_t size = 0;
};

// Allocates if it is too small, twice as much at least. The smaller memory is left alone, since a
// kernel may still use it: in all there is at most four times what the largest call has asked for.
template <typename Allocate>
void* of_size(Kept& kept, size_t size, Allocate allocate) {
  if (kept.size >= size) return kept.memory;
  const size_t larger = std::max(size, 2 * kept.size);
  void* const memory = allocate(larger);
  if (memory != nullptr) kept = {memory, larger};
  return memory;
}

// What is kept of one device.
class DeviceMemory {
 public:
  Scratch of_stream(cudaStream_t stream, size_t bytes, size_t num_counters) {
    const std::lock_guard<std::mutex> lock(mutex_);
    OfStream& kept = by_stream_[stream];
    void* const counters =
        of_size(kept.counters, num_counters, [this](size_t count) { return take(count); });
    void* const memory = bytes > kMostKept ? nullptr : of_size(kept.scratch, bytes, new_memory);
    return {memory, static_cast<unsigned*>(counters)};
  }

  unsigned* unshared_counters(size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return take(count);
  }

 private:
  struct OfStream {
    Kept counters;
    Kept scratch;
  };

  unsigned* take(size_t count) {
    if (left_ < count) {
      const size_t size = std::max(count, kArenaCounters);
      arena_ = new_zeros(size);  // or raises, and then nothing has changed
      left_ = size;
    }
    unsigned* const memory = arena_;
    arena_ += count;
    left_ -= count;
    return memory;
  }

  std::mutex mutex_;
  std::map<cudaStream_t, OfStream> by_stream_;
  unsigned* arena_ = nullptr;
  size_t left_ = 0;
};

// Whether what is enqueued on the stream becomes part of a graph.
bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require_success("attention", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// 0 where the driver does not say. Memory is moved twice in a cycle.
float bandwidth_of(int device) {
  int kilohertz = 0, bits = 0;
  const bool known =
      cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) == cudaSuccess;
  if (!known) cudaGetLastError();
  return known ? 2e3f * static_cast<float>(kilohertz) * static_cast<float>(bits) / 8 : 0.0f;
}

}  // namespace

DeviceLimits device_limits(int device) {
  static std::once_flag once[kMaxDevices];
  static DeviceLimits limits[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("paged_ops: too many devices");
  std::call_once(once[device], [device] {
    limits[device] = {attribute(cudaDevAttrMultiProcessorCount, device),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                      bandwidth_of(device)};
  });
  return limits[device];
}

Scratch kept_scratch(size_t bytes, size_t num_counters, int device, cudaStream_t stream) {
  static DeviceMemory memory[kMaxDevices];
  if (is_capturing(stream)) return {nullptr, memory[device].unshared_counters(num_counters)};
  return memory[device].of_stream(stream, bytes, num_counters);
}

}  // namespace paged_ops::cuda
