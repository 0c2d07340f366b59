// wgmma_sm90, decode of few requests, a cluster a KV head: launcher (the kernel: wgmma_sm90_decode_cluster.cuh).
#include <cuda_runtime.h>

#include <algorithm>

#include "attend/wgmma_sm90_decode.h"
#include "attend/wgmma_sm90_decode_cluster.cuh"

namespace flashcore::decode90 {
namespace {

template <typename T, int kHeadDim, int kN>
struct Launcher {
  using Storage = ClusterStorage<FewTraits<T, kHeadDim, kClusterWarps>, kN>;
  static constexpr auto kKernel = attend_cluster_kernel<FewTraits<T, kHeadDim, kClusterWarps>, kN>;
  static constexpr int kShared = sizeof(Storage);
  static_assert(kShared <= 227 * 1024);

  static bool fits(const AttendParams& p) {
    static const int most = most_clusters(kKernel, kClusterThreads, kShared);
    return p.num_kv_heads <= most;
  }

  static cudaError_t run(const FewParams& params, cudaEvent_t begun) {
    const int ctas = params.attend.num_kv_heads * kClusterCtas;
    if (begun == nullptr) return launch_in_step(params, kKernel, ctas, kClusterThreads, kShared, params);
    return launch_recording(begun, kKernel, ctas, kClusterThreads, kShared,
                            static_cast<cudaStream_t>(params.attend.stream), params);
  }
};

// Calls f with the launcher of the instantiation that the parameters ask for.
template <typename F>
auto dispatch(const Params& params, const F& f) {
  const AttendParams& p = params.attend;
  const auto by_queries = [&]<typename T, int kHeadDim>() {
    return p.num_tokens * params.group <= 8 ? f(Launcher<T, kHeadDim, 1>{}) : f(Launcher<T, kHeadDim, 2>{});
  };
  const auto by_head_dim = [&]<typename T>() {
    return p.head_dim == 64 ? by_queries.template operator()<T, 64>() : by_queries.template operator()<T, 128>();
  };
  return p.dtype == DType::bf16 ? by_head_dim.template operator()<__nv_bfloat16>()
                                : by_head_dim.template operator()<__half>();
}

}  // namespace

bool fits_packed_rows(const Params& params) {
  const AttendParams& p = params.attend;
  if (!p.plan.may_pack()) return true;
  const int queries = p.num_tokens * params.group;
  const int far_queries = queries * (kMaxLevels + 1) - near_queries(2);  // of the line, at most
  return queries <= std::min(kShortQueries, p.plan.rows_per_tile) &&
         p.num_kv_heads * kClusterCtas * far_queries <= p.plan.max_partials;
}

bool fits_cluster(const Params& params) {
  const AttendParams& p = params.attend;
  return p.free_cuts && p.num_kv_heads == kClusterHeads && p.batch <= kClusterBatch && params.group <= kShortQueries &&
         p.num_tokens * params.group <= kFewQueries && has_short_strides(p) &&
         dispatch(params, [&](auto launcher) { return launcher.fits(p); });
}

cudaError_t begin_cluster(const Params& params, cudaEvent_t begun) {
  const FewParams few(params);
  return dispatch(params, [&](auto launcher) { return launcher.run(few, begun); });
}

cudaError_t run_cluster(const Params& params) { return begin_cluster(params, nullptr); }

}  // namespace flashcore::decode90
