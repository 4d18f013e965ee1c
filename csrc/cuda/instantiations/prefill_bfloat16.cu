#include "../prefill_by_head_size.cuh"

namespace paged_ops::cuda {

template void run_prefill<__nv_bfloat16>(const AttentionParams&, int32_t, cudaStream_t);

}  // namespace paged_ops::cuda
