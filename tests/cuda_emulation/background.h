// What goes on beside the threads of an emulated CTA: copies to shared memory and products of
// warpgroups. Whoever does not wait for them is found: until they have ended, what they write holds
// NaN, and what they read is read as late as a GPU may.
#pragma once

#include <deque>
#include <functional>
#include <vector>

namespace emulation {

// Pseudo-random numbers that are the same in each run.
class Random {
 public:
  explicit Random(unsigned seed) : state_(seed) {}
  unsigned below(unsigned end) {
    state_ = state_ * 1664525u + 1013904223u;
    return (state_ >> 8) % end;
  }

 private:
  unsigned state_;
};

// The copies that a thread has begun. They land when it waits for them, and no earlier; those that
// a call is made after, at some time from then on.
class CopyQueue {
 public:
  // Of 16 bytes. nullptr: zeros.
  void copy(void* to, const void* from);
  void commit();
  // Until at most so many groups are under way.
  void wait(int pending);
  // Calls `run` when the copies so far have landed.
  void call_after(std::function<void()> run);
  // Lands at most so many of the copies that a call is made after; false: there were none.
  bool advance(int most);
  bool has_copies() const;
  void clear();

 private:
  enum class Kind { copy, end_of_group, call };
  struct Item {
    Kind kind;
    void* to;
    const void* from;
    std::function<void()> run;
  };

  void land_first();

  std::deque<Item> items_;
  int groups_ = 0;  // ended ones among the items
  int calls_ = 0;   // among the items
};

// The matrix products that a thread has begun, with its warp. Some are computed at once, since they
// may read before the thread goes on, others when they are waited for; by all lanes alike.
class ProductQueue {
 public:
  // Before the first product of a group.
  void begin();
  // `compute` adds to so many `sums`, or writes them.
  void add(float* sums, int count, std::function<void()> compute);
  void commit();
  // Until at most so many groups are under way.
  void wait(int pending);
  bool empty() const { return groups_.empty() && open_.products.empty(); }
  void clear(int warp);

 private:
  // Sums that products write; until they have, the thread finds NaN there.
  struct Sums {
    float* place;
    std::vector<float> values;

    void hide();
    void show() const;
  };
  struct Group {
    std::vector<Sums> sums;
    std::vector<std::function<void()>> products;

    bool has(const float* place) const;
    void compute();
  };

  Group open_;
  std::deque<Group> groups_;
  bool begun_ = false;
  Random random_{0};
};

// Those of the running thread.
CopyQueue& copies();
ProductQueue& products();

// For the scheduler: before the first thread and after the last one of a CTA; lets some copies land
// and returns false if there were none.
void begin_background(int num_threads);
void end_background(int num_threads);
bool advance_background(int num_threads, Random& random);

}  // namespace emulation
