// Torch's thread pool and memory that outlives a call. Plain functions: the files compiled for one
// instruction set include neither torch nor the standard containers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paged_ops::cpu {

// Calls run(context, unit) once for each unit below `num_units`, on at most `max_threads` of
// torch's threads; a thread that is free takes the next unit.
void for_each_unit(int64_t num_units, int64_t max_threads, void (*run)(const void*, int64_t),
                   const void* context);

template <typename Run>
void for_each_unit(int64_t num_units, int64_t max_threads, const Run& run) {
  for_each_unit(
      num_units, max_threads,
      [](const void* context, int64_t unit) { (*static_cast<const Run*>(context))(unit); }, &run);
}

// Memory of the calling thread, aligned to 64 bytes, valid until its next call for the same
// purpose. Its content is undefined. It is kept from call to call: attention allocates nothing once
// warm.
enum class Scratch { kSchedule, kPartials, kUnit };
void* scratch(Scratch purpose, size_t bytes);

}  // namespace paged_ops::cpu
