// What every kernels_*.cpp includes before the compiler may use an instruction set: all of it is
// shared with other files.
#pragma once

#if defined(__x86_64__)
// GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cmath>
#include <cstring>
#include <type_traits>

#include "elements.h"
#include "kernels.h"
#include "schedule.h"
#include "threads.h"

namespace paged_ops::cpu {

// What a thread has to set up before it multiplies: nothing, where all is done in vectors (see
// AmxTiles).
struct NoTiles {
  explicit NoTiles(int64_t /*num_rows*/) {}
};

}  // namespace paged_ops::cpu
