#include "../prefill_sm90a.cuh"

namespace paged_ops::cuda {

template bool runs_on_warpgroups<__nv_bfloat16>(const AttentionParams&);
template void run_prefill_on_warpgroups<__nv_bfloat16>(const AttentionParams&, int32_t,
                                                       const DeviceLimits&, unsigned*,
                                                       cudaStream_t);

}  // namespace paged_ops::cuda
