#include "../decode_by_head_size.cuh"

namespace paged_ops::cuda {

template DecodePlan plan_decode<__half>(const AttentionParams&, const DeviceLimits&);
template void run_decode<__half>(const AttentionParams&, const DecodePlan&, const PieceStore&,
                                 cudaStream_t);

}  // namespace paged_ops::cuda
