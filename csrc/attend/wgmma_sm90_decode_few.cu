// wgmma_sm90, decode without packed rows, or of few queries: launcher (the kernel: wgmma_sm90_decode_few.cuh).
#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode.h"
#include "attend/wgmma_sm90_decode_few.cuh"

namespace flashcore::decode90 {
namespace {

template <typename T, int kHeadDim, int kN>
cudaError_t launch(const FewParams& params) {
  using Traits = FewTraits<T, kHeadDim, kConsumerWarps>;
  const auto kernel = attend_few_kernel<Traits, kN>;
  constexpr int kShared = sizeof(PieceRings<Traits>);
  // Left to itself, the driver gives an SM no more shared memory than two CTAs need, and none is left for the merge's.
  static const cudaError_t opt_in = [&] {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }();
  if (opt_in != cudaSuccess) return opt_in;
  return launch_in_step(params, kernel, params.attend.plan.num_ctas, kFewThreads, kShared, params);
}

// Two kernels instead of branches: the code that runs is to be short and in one piece.
template <typename T, int kHeadDim>
cudaError_t dispatch_queries(const FewParams& params) {
  const bool packed = params.serves != Serves::not_sharing && params.attend.plan.may_pack();
  const int tokens = packed ? params.attend.num_tokens : 1;  // of a row at most
  return tokens * params.group <= 8 ? launch<T, kHeadDim, 1>(params) : launch<T, kHeadDim, 2>(params);
}

template <typename T>
cudaError_t dispatch(const FewParams& params) {
  return params.attend.head_dim == 64 ? dispatch_queries<T, 64>(params) : dispatch_queries<T, 128>(params);
}

}  // namespace

bool has_short_strides(const AttendParams& p) {
  const auto is_short = [&](int64_t page, int64_t token, int64_t head) {
    const int64_t in_page = token * p.page_size + head * p.num_kv_heads;
    return page == static_cast<int32_t>(page) && in_page == static_cast<int32_t>(in_page);
  };
  return is_short(p.k_stride_page, p.k_stride_token, p.k_stride_head) &&
         is_short(p.v_stride_page, p.v_stride_token, p.v_stride_head);
}

cudaError_t run_few(const Params& params) {
  const FewParams few(params);
  return params.attend.dtype == DType::bf16 ? dispatch<__nv_bfloat16>(few) : dispatch<__half>(few);
}

}  // namespace flashcore::decode90
