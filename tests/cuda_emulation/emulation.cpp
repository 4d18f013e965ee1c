#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "background.h"

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  void* stack_pointer;
  char* stack;
  bool done;
  int parity;  // of `gathered`: a fast lane may be one exchange ahead of a slow one
};

struct Barrier {
  int arrived;
  int generation;
};

Fiber fibers[kMaxThreads];
Barrier cta_barriers[16];
Barrier warp_barriers[kMaxThreads / kWarpSize];
unsigned long gathered[kMaxThreads / kWarpSize][2][kWarpSize];
std::vector<unsigned char> shared_memory;
void* scheduler_stack_pointer;
const std::function<void()>* body;
int num_threads;
int current;  // the running fiber
long progress_made;
bool trapped;
Random schedule_random(12345);

// Saves the callee-saved registers of x86-64's calling convention and goes on elsewhere.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

void enter_fiber() {
  (*body)();
  fibers[current].done = true;
  ++progress_made;
  yield();
  std::abort();
}

void arrive(Barrier& barrier, int expected) {
  if (++barrier.arrived != expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  ++progress_made;
}

void wait(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  arrive(barrier, expected);
  while (barrier.generation == generation) yield();
}

void start_fiber(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // alignment at entry
  *--top = reinterpret_cast<void*>(enter_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber = {top, fiber.stack, false, 0};
}

// A random order, so that nothing comes to depend on one.
std::vector<int> shuffled_threads() {
  std::vector<int> order(num_threads);
  for (int i = 0; i < num_threads; ++i) order[i] = i;
  for (int i = num_threads - 1; i > 0; --i) {
    std::swap(order[i], order[schedule_random.below(i + 1)]);
  }
  return order;
}

// Holds some warps up, so that others get ahead of them as far as the barriers let them.
class Delays {
 public:
  void begin_round() {
    for (int& rounds : left_) rounds = std::max(rounds - 1, 0);
    if (schedule_random.below(kRoundsBetween) == 0) {
      left_[schedule_random.below(num_threads / kWarpSize)] = 1 + schedule_random.below(kMost);
    }
  }
  bool holds(int thread) const { return left_[thread / kWarpSize] > 0; }
  // False: no warp was held up.
  bool end() {
    const bool some = *std::max_element(std::begin(left_), std::end(left_)) > 0;
    std::fill(std::begin(left_), std::end(left_), 0);
    return some;
  }

 private:
  static constexpr int kRoundsBetween = 16, kMost = 64;
  int left_[kMaxThreads / kWarpSize] = {};  // rounds
};

bool run_cta() {
  std::fill(std::begin(cta_barriers), std::end(cta_barriers), Barrier{});
  std::fill(std::begin(warp_barriers), std::end(warp_barriers), Barrier{});
  for (int thread = 0; thread < num_threads; ++thread) start_fiber(fibers[thread]);
  begin_background(num_threads);
  const std::vector<int> order = shuffled_threads();
  Delays delays;
  for (bool left = true; left;) {
    left = false;
    const long before = progress_made;
    delays.begin_round();
    for (const int thread : order) {
      if (fibers[thread].done) continue;
      left = true;
      if (delays.holds(thread)) continue;
      current = thread;
      threadIdx = dim3(thread);
      switch_stack(&scheduler_stack_pointer, fibers[thread].stack_pointer);
      if (trapped) return false;
    }
    const bool stuck = left && progress_made == before;
    const bool landed = (stuck || schedule_random.below(8) == 0) &&
                        advance_background(num_threads, schedule_random);
    if (stuck && !delays.end() && !landed) fail("a barrier that some threads never reach");
  }
  if (cta_barriers[0].arrived != 0) fail("a barrier was left open");
  end_background(num_threads);
  return true;
}

}  // namespace

void sync_cta() { wait(cta_barriers[0], num_threads); }

void sync_threads(int barrier, int threads, bool wait_too) {
  wait_too ? wait(cta_barriers[barrier], threads) : arrive(cta_barriers[barrier], threads);
}

void yield() { switch_stack(&fibers[current].stack_pointer, scheduler_stack_pointer); }

void progress() { ++progress_made; }

void sync_warp() { wait(warp_barriers[current / kWarpSize], kWarpSize); }

int gather(unsigned long mine, unsigned long (&all)[32]) {
  const int warp = current / kWarpSize, lane = current % kWarpSize;
  const int parity = fibers[current].parity ^= 1;
  gathered[warp][parity][lane] = mine;
  sync_warp();
  std::copy(std::begin(gathered[warp][parity]), std::end(gathered[warp][parity]), all);
  return lane;
}

unsigned char* dynamic_shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(shared_memory.data());
  return shared_memory.data() + (-address & 127);
}

void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

void trap() {
  trapped = true;
  yield();
  std::abort();
}

bool run(dim3 grid, dim3 cta, size_t shared_bytes, const std::function<void()>& kernel) {
  if (cta.x % kWarpSize != 0 || cta.x > kMaxThreads || cta.y != 1 || cta.z != 1) fail("CTA size");
  body = &kernel;
  num_threads = static_cast<int>(cta.x);
  trapped = false;
  shared_memory.assign(shared_bytes + 128, 0xff);  // NaN
  gridDim = grid;
  blockDim = cta;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      if (!run_cta()) return false;
    }
  }
  return true;
}

}  // namespace emulation
