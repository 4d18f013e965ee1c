#include "../prefill_by_head_size.cuh"

namespace paged_ops::cuda {

template PrefillBeside prefill_beside<__nv_bfloat16>(const AttentionParams&, int32_t,
                                                     const DeviceLimits&);
template void run_prefill<__nv_bfloat16>(const AttentionParams&, int32_t, const DeviceLimits&,
                                         unsigned*, cudaStream_t);

}  // namespace paged_ops::cuda
