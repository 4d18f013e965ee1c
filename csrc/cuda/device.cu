#include "device.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace paged_ops::cuda {
namespace {

constexpr size_t kArenaCounters = 1 << 20;
constexpr size_t kMostKept = 16 << 20;  // bytes of scratch memory for a stream

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

// Hands out counters of one device.
class Counters {
 public:
  unsigned* of_stream(cudaStream_t stream, size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& [memory, size] = by_stream_[stream];
    if (size < count) {
      memory = take(count);
      size = count;
    }
    return memory;
  }

  unsigned* unshared(size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return take(count);
  }

 private:
  unsigned* take(size_t count) {
    if (left_ < count) {
      left_ = std::max(count, kArenaCounters);
      arena_ = new_zeros(left_);
    }
    unsigned* const memory = arena_;
    arena_ += count;
    left_ -= count;
    return memory;
  }

  std::mutex mutex_;
  std::map<cudaStream_t, std::pair<unsigned*, size_t>> by_stream_;
  unsigned* arena_ = nullptr;
  size_t left_ = 0;
};

// Scratch memory of one device by stream. What has become too small is left alone: a kernel may
// still use it.
class StreamMemory {
 public:
  void* of(cudaStream_t stream, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& [memory, size] = by_stream_[stream];
    if (size < bytes) {
      const Relaxed relaxed;
      void* larger = nullptr;
      const size_t wanted = std::min(std::max(bytes, 2 * size), kMostKept);
      if (cudaMalloc(&larger, wanted) != cudaSuccess) {
        cudaGetLastError();
        return nullptr;
      }
      memory = larger;
      size = wanted;
    }
    return memory;
  }

 private:
  std::mutex mutex_;
  std::map<cudaStream_t, std::pair<void*, size_t>> by_stream_;
};

}  // namespace

DeviceLimits device_limits(int device) {
  static std::once_flag once[kMaxDevices];
  static DeviceLimits limits[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("paged_ops: too many devices");
  std::call_once(once[device], [device] {
    limits[device] = {attribute(cudaDevAttrMultiProcessorCount, device),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  });
  return limits[device];
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require_success("attention", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

unsigned* zeroed_counters(size_t count, int device, cudaStream_t stream, bool capturing) {
  static Counters counters[kMaxDevices];
  Counters& here = counters[device];
  return capturing ? here.unshared(count) : here.of_stream(stream, count);
}

void* stream_memory(size_t bytes, int device, cudaStream_t stream, bool capturing) {
  static StreamMemory memory[kMaxDevices];
  if (bytes == 0 || bytes > kMostKept || capturing) return nullptr;
  return memory[device].of(stream, bytes);
}

}  // namespace paged_ops::cuda
