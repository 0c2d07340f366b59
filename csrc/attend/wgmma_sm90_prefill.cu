// run_attend_wgmma_sm90_prefill: which traits serve which head size and element type.
#include "attend/wgmma_sm90_prefill.cuh"

namespace flashcore {
namespace {

// Measured on an H200 (scripts/bench/NOTES.md). Head sizes 64 and 128 need three softmaxes in flight to keep up with
// the tensor cores; at 256 O leaves registers for two warpgroups only.
template <typename T, bool kSoftCap>
cudaError_t launch_head_dim(const AttendParams& p) {
  using prefill::launch;
  using prefill::Traits;
  switch (p.head_dim) {
    // <type, head size, consumers, keys of a block, stages, Q buffers, overlap, soft cap>
    case 64:
      return launch<Traits<T, 64, 3, 128, 4, 2, true, kSoftCap>>(p);
    case 128:
      return launch<Traits<T, 128, 3, 128, 2, 2, false, kSoftCap>>(p);
    case 256:
      return launch<Traits<T, 256, 2, 64, 2, 1, true, kSoftCap>>(p);
    default:
      return cudaErrorNotSupported;
  }
}

template <typename T>
cudaError_t launch_type(const AttendParams& p) {
  return p.logits_soft_cap > 0.0f ? launch_head_dim<T, true>(p) : launch_head_dim<T, false>(p);
}

}  // namespace

int run_attend_wgmma_sm90_prefill(const AttendParams& p) {
  if (p.num_tokens == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::bf16:
      return launch_type<__nv_bfloat16>(p);
    case DType::fp16:
      return launch_type<__half>(p);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace flashcore
