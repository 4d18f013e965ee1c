#include "../prefill_by_head_size.cuh"

namespace paged_ops::cuda {

template PrefillBeside prefill_beside<__nv_fp8_e4m3>(const AttentionParams&, int32_t,
                                                     const DeviceLimits&);
template void run_prefill<__nv_fp8_e4m3>(const AttentionParams&, int32_t, const DeviceLimits&,
                                         unsigned*, cudaStream_t);

}  // namespace paged_ops::cuda
