// wgmma_sm90, decode of few queries, a cluster a KV head: launcher (the kernel: wgmma_sm90_decode_cluster.cuh).
#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode.h"
#include "attend/wgmma_sm90_decode_cluster.cuh"

namespace flashcore::decode90 {
namespace {

template <typename T, int kHeadDim, int kN>
cudaError_t launch(const FewParams& params) {
  using Traits = FewTraits<T, kHeadDim, kClusterWarps>;
  const auto kernel = attend_cluster_kernel<Traits, kN>;
  constexpr int kShared = sizeof(ClusterStorage<Traits, kN>);
  static_assert(kShared <= 227 * 1024);
  static const cudaError_t opt_in = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (opt_in != cudaSuccess) return opt_in;
  const AttendParams& p = params.attend;
  const int ctas = p.num_kv_heads * kClusterCtas;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (p.lists_begin > 0) {  // beside select
    return launch_dependent_shared(kernel, ctas, kClusterThreads, kShared, stream, params);
  }
  kernel<<<ctas, kClusterThreads, kShared, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, int kHeadDim>
cudaError_t dispatch_queries(const FewParams& params) {
  return params.attend.num_tokens * params.group <= 8 ? launch<T, kHeadDim, 1>(params) : launch<T, kHeadDim, 2>(params);
}

template <typename T>
cudaError_t dispatch(const FewParams& params) {
  return params.attend.head_dim == 64 ? dispatch_queries<T, 64>(params) : dispatch_queries<T, 128>(params);
}

}  // namespace

cudaError_t run_cluster(const Params& params) {
  const FewParams few(params);
  return params.attend.dtype == DType::bf16 ? dispatch<__nv_bfloat16>(few) : dispatch<__half>(few);
}

}  // namespace flashcore::decode90
