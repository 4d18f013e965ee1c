// Fetching memory ahead of its use.

namespace paged_ops::cpu {
namespace {

// Fetches the memory of the next tile, some lines at a time, wherever this one is computed with. A
// processor has some twenty fetches under way at once: evenly spread, in the order of memory, they
// come for free; in bursts they hold up what is computed meanwhile.
struct Ahead {
  static constexpr int kLine = 64;
  static constexpr int kMaxRuns = 1024;  // what is beyond is not fetched
  struct Run {
    const char* begin;
    int64_t size;
  };

  Run runs[kMaxRuns];
  int num_runs = 0;
  int run = 0;
  int64_t pace_bytes = 0;
  int64_t total = 0;
  const char* next = nullptr;
  int64_t left = 0;

  // Before the first fetch(), of which there will be `steps` altogether.
  void start(int64_t steps) {
    pace_bytes = (total + steps * kLine - 1) / (steps * kLine) * kLine;
    advance();
  }
  inline void fetch() {
    if (left <= 0) return;
    const char* const end = next + pace_bytes;
    for (; next != end; next += kLine) __builtin_prefetch(next, 0, 2);
    left -= pace_bytes;
    if (left <= 0) advance();
  }
  // At once, where nothing is computed meanwhile.
  void fetch_all() const {
    for (int i = 0; i < num_runs; ++i) {
      for (int64_t at = 0; at < runs[i].size; at += kLine) {
        __builtin_prefetch(runs[i].begin + at, 0, 2);
      }
    }
  }
  void advance() {
    if (run == num_runs) return;
    next = runs[run].begin;
    left = runs[run].size;
    ++run;
  }
  // Joins the run before if it follows it without a gap.
  void add(const void* begin, int64_t size) {
    const char* const data = static_cast<const char*>(begin);
    total += size;
    if (num_runs > 0 && runs[num_runs - 1].begin + runs[num_runs - 1].size == data) {
      runs[num_runs - 1].size += size;
    } else if (num_runs < kMaxRuns) {
      runs[num_runs++] = {data, size};
    }
  }
};

}  // namespace
}  // namespace paged_ops::cpu
