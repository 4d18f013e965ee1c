#include "../prefill_sm90a.cuh"

namespace paged_ops::cuda {

template bool runs_on_warpgroups<__half>(const AttentionParams&);
template void run_prefill_on_warpgroups<__half>(const AttentionParams&, int32_t,
                                                const DeviceLimits&, unsigned*, cudaStream_t);

}  // namespace paged_ops::cuda
