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
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kClusterCtas;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.num_kv_heads * kClusterCtas);
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(p.stream);
  config.attrs = attributes;
  config.numAttrs = p.lists_begin > 0 ? 2 : 1;  // beside select
  return cudaLaunchKernelEx(&config, kernel, params);
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
