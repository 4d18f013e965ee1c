// Checks of the values in the index tensors, which a CPU kernel can afford: a block id, a length or
// a slot that is out of range raises before anything is read or written.
#pragma once

#include "../params.h"

namespace paged_ops::cpu {

void check_values(const AttentionParams& params);
void check_values(const WriteKvParams& params);
void check_values(const CopyBlocksParams& params);

}  // namespace paged_ops::cpu
