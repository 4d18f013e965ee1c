// Works a BlockManager hard, for the sanitizers, and without memory:
// tests/sanitize_block_manager.sh.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "block_manager.h"

namespace {

// How many allocations of this thread succeed before one fails; negative: all do.
thread_local int64_t allocations_left = -1;

void* allocate(std::size_t size) {
  const bool fails = allocations_left == 0;
  if (allocations_left >= 0) --allocations_left;
  void* const memory = fails ? nullptr : std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// Not inlined, or g++ takes malloc and delete, or new and free, for a pair that does not match.
[[gnu::noinline]] void* operator new(std::size_t size) { return allocate(size); }
[[gnu::noinline]] void* operator new[](std::size_t size) { return allocate(size); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using paged_ops::BlockManager;
using paged_ops::StepBuffers;

constexpr int64_t kIds = 6;  // of a worker
constexpr int64_t kRows = kIds;
constexpr int64_t kMaxBlocks = 8;

// One thread's sequences of a manager that several may share, and the memory of its steps.
class Worker {
 public:
  Worker(BlockManager* manager, int64_t number)
      : manager_(manager), number_(number), random_(static_cast<uint32_t>(number)) {
    buffers_ = {kRows,
                kMaxBlocks,
                table_.data(),
                lens_.data(),
                slots_.data(),
                positions_.data(),
                std::vector<StepBuffers::Row>(kRows),
                kRows};
  }

  // Any operation; that some are refused is part of the work.
  void work() {
    try {
      operate();
      ++done_;
    } catch (const paged_ops::OutOfBlocks&) {
      if (below(2) == 0) free_all();
    } catch (const std::invalid_argument&) {
    }
  }

  void free_all() {
    for (int64_t i = 0; i < kIds; ++i) {
      if (manager_->contains(id(i))) manager_->free(id(i));
    }
  }

  int64_t done() const { return done_; }

 private:
  int64_t below(int64_t limit) {
    return std::uniform_int_distribution<int64_t>(0, limit - 1)(random_);
  }
  int64_t id(int64_t i) const { return number_ * kIds + i; }

  // Few different ones, so that threads meet in the prefix cache.
  std::vector<int64_t> tokens(int64_t count) {
    std::vector<int64_t> result(count, below(2));
    if (count > 0) result.back() = below(3);
    return result;
  }

  void operate() {
    const int64_t seq_id = id(below(kIds));
    const paged_ops::Ids one{&seq_id, 1};
    switch (below(13)) {
      case 0:
        return manager_->allocate(seq_id, below(20));
      case 1:
        return static_cast<void>(manager_->append(one, 1 + below(5)));
      case 2:
        return static_cast<void>(manager_->reserve(one, 1 + below(5)));
      case 3:
        return manager_->truncate(seq_id, below(12));
      case 4:
        return manager_->fork(id(below(kIds)), seq_id);
      case 5:
        return manager_->free(seq_id);
      case 6:
        return static_cast<void>(manager_->preempt(seq_id));
      case 7:
        return share(seq_id);
      case 8:
        return publish(seq_id);
      case 9:
        return pin();
      case 10:
        return step();
      case 11:
        if (below(8) == 0) manager_->reset_prefix_cache();
        return;
      default:
        return inspect(seq_id);
    }
  }

  void share(int64_t seq_id) {
    const std::vector<int64_t> wanted = tokens(below(20));
    manager_->lookup({wanted.data(), static_cast<int64_t>(wanted.size())}, 0);
    manager_->share(seq_id, {wanted.data(), static_cast<int64_t>(wanted.size())}, 0);
  }

  void publish(int64_t seq_id) {
    const std::vector<int64_t> written = tokens(manager_->length(seq_id));
    manager_->publish(seq_id, {written.data(), static_cast<int64_t>(written.size())}, 0);
  }

  void pin() {
    const std::vector<int64_t> prefix = tokens(below(9));
    const paged_ops::Tokens span{prefix.data(), static_cast<int64_t>(prefix.size())};
    manager_->pin(span, 0);
    manager_->unpin(span, 0);
  }

  void step() {
    std::vector<int64_t> running;
    for (int64_t i = 0; i < kIds; ++i) {
      if (manager_->contains(id(i))) running.push_back(id(i));
    }
    manager_->step({running.data(), static_cast<int64_t>(running.size())}, &buffers_);
    const std::vector<int64_t> counts(running.size(), 1);
    const int64_t count = static_cast<int64_t>(running.size());
    manager_->batch({running.data(), count}, {counts.data(), count}, 2 * kMaxBlocks);
  }

  void inspect(int64_t seq_id) {
    manager_->state();
    manager_->can_allocate(below(30));
    manager_->ref_count(below(manager_->num_blocks()));
    if (below(8) == 0) manager_->check();
    manager_->blocks(seq_id);
  }

  BlockManager* manager_;
  int64_t number_;
  std::mt19937 random_;
  int64_t done_ = 0;
  std::vector<int32_t> table_ = std::vector<int32_t>(kRows * kMaxBlocks);
  std::vector<int32_t> lens_ = std::vector<int32_t>(kRows);
  std::vector<int64_t> slots_ = std::vector<int64_t>(kRows);
  std::vector<int64_t> positions_ = std::vector<int64_t>(kRows);
  StepBuffers buffers_;
};

// How many operations succeeded; at the end every block is free again.
int64_t run(int64_t num_blocks, int64_t block_size, int64_t num_threads, int64_t num_operations) {
  BlockManager manager(num_blocks, block_size, 1, paged_ops::kLongest);
  std::vector<Worker> workers;
  for (int64_t i = 0; i < num_threads; ++i) workers.emplace_back(&manager, i);
  std::vector<std::thread> threads;
  for (Worker& worker : workers) {
    threads.emplace_back([&worker, num_operations] {
      for (int64_t i = 0; i < num_operations; ++i) worker.work();
      worker.free_all();
    });
  }
  for (std::thread& thread : threads) thread.join();
  manager.check();
  int64_t done = 0;
  for (const Worker& worker : workers) done += worker.done();
  const bool all_back =
      manager.num_free_blocks() + manager.num_evictable_blocks() == manager.num_blocks();
  return all_back ? done : -1;
}

// One operation on a manager with shared, published and pinned blocks.
struct Operation {
  const char* name;
  void (*run)(BlockManager* manager);
};

// Tokens 0, 1, 2 and so on, and the ids of the sequences that grow.
constexpr int64_t kNumTokens = 160;
const std::vector<int64_t> kCounting = [] {
  std::vector<int64_t> tokens(kNumTokens);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}();
const std::vector<int64_t> kGrowing = {1, 2, 3};

paged_ops::Tokens counting(int64_t size) { return {kCounting.data(), size}; }
paged_ops::Ids growing() { return {kGrowing.data(), static_cast<int64_t>(kGrowing.size())}; }

void set_up(BlockManager* manager) {
  manager->allocate(1, 6);  // shares its last block with two others
  manager->fork(1, 2);
  manager->fork(1, 3);
  manager->allocate(4, 8);
  manager->publish(4, counting(8), 0);
  manager->allocate(5, kNumTokens);
  for (int64_t seq_id = 6; seq_id < 9; ++seq_id) manager->allocate(seq_id, 0);  // eight in all
}

const Operation kOperations[] = {
    {"allocate", [](BlockManager* manager) { manager->allocate(9, 9); }},
    {"append", [](BlockManager* manager) { manager->append(growing(), 30); }},
    {"append each",
     [](BlockManager* manager) {
       const int64_t counts[] = {9, 1, 20};
       manager->append(growing(), {counts, 3});
     }},
    {"reserve", [](BlockManager* manager) { manager->reserve(growing(), 3); }},
    {"step",
     [](BlockManager* manager) {
       std::vector<int32_t> table(3 * 8), lens(3);
       std::vector<int64_t> slots(3), positions(3);
       StepBuffers buffers{3,
                           8,
                           table.data(),
                           lens.data(),
                           slots.data(),
                           positions.data(),
                           std::vector<StepBuffers::Row>(3),
                           3};
       manager->step(growing(), &buffers);
     }},
    {"truncate", [](BlockManager* manager) { manager->truncate(1, 3); }},
    {"fork", [](BlockManager* manager) { manager->fork(1, 9); }},
    {"preempt", [](BlockManager* manager) { manager->preempt(4); }},
    {"free", [](BlockManager* manager) { manager->free(4); }},
    {"share", [](BlockManager* manager) { manager->share(6, counting(8), 0); }},
    {"publish", [](BlockManager* manager) { manager->publish(5, counting(kNumTokens), 1); }},
    {"pin", [](BlockManager* manager) { manager->pin(counting(8), 0); }},
    {"reset_prefix_cache", [](BlockManager* manager) { manager->reset_prefix_cache(); }},
};

std::string describe(const BlockManager& manager) {
  const paged_ops::State state = manager.state();
  std::string text;
  const auto add = [&text](int64_t number) { text += std::to_string(number) + ' '; };
  for (const int64_t number :
       {state.num_free_blocks, state.num_evictable_blocks, state.num_cached_blocks,
        state.num_pinned_blocks, state.prefix.shares, state.prefix.blocks_published}) {
    add(number);
  }
  for (const paged_ops::SequenceState& sequence : state.sequences) {
    for (const int64_t number : {sequence.seq_id, sequence.length, sequence.published_blocks}) {
      add(number);
    }
    for (const int32_t block : sequence.blocks) add(block);
  }
  return text;
}

// Whether a failure of each allocation in turn leaves everything as it was, and ready for another
// try.
bool survives_without_memory(const Operation& operation) {
  for (int64_t allowed = 0;; ++allowed) {
    BlockManager manager(100, 4, 0, paged_ops::kLongest);
    set_up(&manager);
    const std::string before = describe(manager);
    allocations_left = allowed;
    try {
      operation.run(&manager);
      const bool failed = allocations_left < 0;
      allocations_left = -1;
      if (!failed) return true;
      std::printf("%s hides that allocation %d failed\n", operation.name,
                  static_cast<int>(allowed));
      return false;
    } catch (const std::bad_alloc&) {
      manager.check();
      if (describe(manager) != before) {
        std::printf("%s has changed something when allocation %d fails\n", operation.name,
                    static_cast<int>(allowed));
        return false;
      }
      operation.run(&manager);
      manager.check();
    }
  }
}

}  // namespace

int main() {
  bool survives = true;
  for (const Operation& operation : kOperations) {
    survives = survives_without_memory(operation) && survives;
  }
  if (!survives) return EXIT_FAILURE;
  for (const int64_t num_threads : {1, 4}) {
    for (const int64_t block_size : {1, 3, 4}) {
      const int64_t num_operations = 20000 / num_threads;
      const int64_t done = run(24, block_size, num_threads, num_operations);
      if (done < num_operations / 10) return EXIT_FAILURE;
      std::printf("%d threads, block_size %d: %d operations\n", static_cast<int>(num_threads),
                  static_cast<int>(block_size), static_cast<int>(done));
    }
  }
  return EXIT_SUCCESS;
}
