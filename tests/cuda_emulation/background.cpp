#include "background.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "emulation.h"

namespace emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kCopyBytes = 16;

CopyQueue copy_queues[kMaxThreads];
ProductQueue product_queues[kMaxThreads];

}  // namespace

void CopyQueue::copy(void* to, const void* from) {
  std::memset(to, 0xff, kCopyBytes);  // NaN
  items_.push_back({Kind::copy, to, from, {}});
}

void CopyQueue::commit() {
  items_.push_back({Kind::end_of_group, nullptr, nullptr, {}});
  ++groups_;
}

void CopyQueue::wait(int pending) {
  while (groups_ > pending) land_first();
}

void CopyQueue::call_after(std::function<void()> run) {
  items_.push_back({Kind::call, nullptr, nullptr, std::move(run)});
  ++calls_;
}

bool CopyQueue::advance(int most) {
  const bool some = calls_ > 0;
  for (; most > 0 && calls_ > 0; --most) land_first();
  return some;
}

bool CopyQueue::has_copies() const {
  return std::any_of(items_.begin(), items_.end(),
                     [](const Item& item) { return item.kind != Kind::end_of_group; });
}

void CopyQueue::clear() {
  items_.clear();
  groups_ = calls_ = 0;
}

void CopyQueue::land_first() {
  const Item item = std::move(items_.front());
  items_.pop_front();
  switch (item.kind) {
    case Kind::copy:
      if (item.from == nullptr) {
        std::memset(item.to, 0, kCopyBytes);
      } else {
        std::memcpy(item.to, item.from, kCopyBytes);
      }
      break;
    case Kind::end_of_group:
      --groups_;
      break;
    case Kind::call:
      --calls_;
      item.run();
      break;
  }
}

void ProductQueue::Sums::hide() {
  std::copy_n(place, values.size(), values.begin());
  std::fill_n(place, values.size(), NAN);
}

void ProductQueue::Sums::show() const { std::copy(values.begin(), values.end(), place); }

bool ProductQueue::Group::has(const float* place) const {
  return std::any_of(sums.begin(), sums.end(),
                     [&](const Sums& some) { return some.place == place; });
}

void ProductQueue::Group::compute() {
  for (const auto& product : products) product();
  products.clear();
}

void ProductQueue::begin() { begun_ = true; }

void ProductQueue::add(float* sums, int count, std::function<void()> compute) {
  if (!begun_) fail("a product without begin_products");
  for (const Group& group : groups_) {
    if (group.has(sums)) fail("a product adds to what another group writes: not emulated");
  }
  if (!open_.has(sums)) {
    open_.sums.push_back({sums, std::vector<float>(count)});
    open_.sums.back().hide();
  }
  open_.products.push_back(std::move(compute));
}

void ProductQueue::commit() {
  groups_.push_back(std::exchange(open_, {}));
  begun_ = false;
  if (random_.below(2) == 0) return;
  Group& group = groups_.back();
  for (const Sums& sums : group.sums) sums.show();
  group.compute();
  for (Sums& sums : group.sums) sums.hide();
}

void ProductQueue::wait(int pending) {
  if (!open_.products.empty()) fail("a product without commit_products");
  while (static_cast<int>(groups_.size()) > pending) {
    for (const Sums& sums : groups_.front().sums) sums.show();
    groups_.front().compute();
    groups_.pop_front();
  }
  sync_warp();  // no lane goes on before the products of all have read their operands
}

void ProductQueue::clear(int warp) {
  open_ = {};
  groups_.clear();
  begun_ = false;
  random_ = Random(blockIdx.x * 32 + warp);
}

CopyQueue& copies() { return copy_queues[threadIdx.x]; }
ProductQueue& products() { return product_queues[threadIdx.x]; }

void begin_background(int num_threads) {
  for (int thread = 0; thread < num_threads; ++thread) {
    copy_queues[thread].clear();
    product_queues[thread].clear(thread / 32);
  }
}

void end_background(int num_threads) {
  for (int thread = 0; thread < num_threads; ++thread) {
    if (copy_queues[thread].has_copies()) fail("a thread has not waited for its copies");
    if (!product_queues[thread].empty()) fail("a thread has not waited for its products");
  }
}

bool advance_background(int num_threads, Random& random) {
  bool some = false;
  const unsigned first = random.below(num_threads);
  for (int i = 0; i < num_threads; ++i) {
    const int most = static_cast<int>(random.below(40));
    some |= copy_queues[(first + i) % num_threads].advance(most);
  }
  return some;
}

}  // namespace emulation
