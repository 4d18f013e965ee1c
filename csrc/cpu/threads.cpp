#include "threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace paged_ops::cpu {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  size_t size = 0;
};

}  // namespace

void for_each_unit(int64_t num_units, int64_t max_threads, void (*run)(const void*, int64_t),
                   const void* context) {
  const int64_t pool = max_threads > 1 ? torch::stable::get_num_threads() : 1;
  const int64_t num_threads = std::min({num_units, max_threads, pool});
  if (num_threads <= 1) {
    for (int64_t unit = 0; unit < num_units; ++unit) run(context, unit);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < num_units;) {
      run(context, unit);
    }
  });
}

void* scratch(Scratch purpose, size_t bytes) {
  constexpr size_t kAlignment = 64;
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (bytes > buffer.size) {
    buffer = {};
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    buffer.memory.reset(std::aligned_alloc(kAlignment, size));
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.memory.get();
}

}  // namespace paged_ops::cpu
