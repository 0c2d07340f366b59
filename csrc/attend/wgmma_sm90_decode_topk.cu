// wgmma_sm90, decode of one request under policy topk in one launch: launcher (the kernel:
// wgmma_sm90_decode_topk.cuh).
#include <cuda_runtime.h>

#include <utility>

#include "attend/wgmma_sm90_decode.h"
#include "attend/wgmma_sm90_decode_topk.cuh"

namespace flashcore::decode90 {
namespace {

template <typename T, typename S, int kHeadDim, int kVectors>
struct Launcher {
  using Traits = FewTraits<T, kHeadDim, kClusterWarps>;
  using Score = score::Traits<T, S, kHeadDim / 32, kVectors>;
  static constexpr int kShared = sizeof(TopkStorage<Traits>);
  static constexpr bool kServed = Score::kSummaryBytes % 128 == 0;  // rows of the copy engine
  static_assert(kShared <= 227 * 1024);

  static bool fits() {
    if constexpr (kServed) {
      static const int most = most_clusters(attend_topk_kernel<Traits, Score>, kTopkThreads, kShared);
      return most >= kClusterHeads;
    }
    return false;
  }
  static cudaError_t run(const TopkParams& params) {
    if constexpr (kServed) {
      if (fits()) return launch(params);
    }
    return cudaErrorInvalidValue;
  }

 private:
  static cudaError_t launch(const TopkParams& params) {
    const AttendParams& p = params.attend;
    CUtensorMap k_map, v_map;
    const cudaError_t error = make_cache_maps(&k_map, &v_map, p, kWarpKeys, kHeadDim / kSlab);
    if (error != cudaSuccess) return error;
    SummaryMaps summaries;
    for (const auto [map, pages] : {std::pair{&summaries.page, 1}, std::pair{&summaries.unit, score::kPages}}) {
      const SummarizeParams& of = params.select.pages;
      const cudaError_t failed =
          make_summary_map(map, of.summaries.data, Score::kSummaryBytes, of.num_kv_heads, of.num_pages, pages);
      if (failed != cudaSuccess) return failed;
    }
    return launch_dependent_shared(attend_topk_kernel<Traits, Score>, kClusterHeads * kClusterCtas, kTopkThreads,
                                   kShared, static_cast<cudaStream_t>(p.stream), summaries, k_map, v_map, params);
  }
};

// Calls f with the launcher of the instantiation that the parameters ask for.
template <typename F>
auto dispatch(const SelectParams& p, const F& f) {
  const auto by_vectors = [&]<typename T, typename S, int kHeadDim>() {
    return p.pages.summaries.vectors() == 2 ? f(Launcher<T, S, kHeadDim, 2>{}) : f(Launcher<T, S, kHeadDim, 1>{});
  };
  const auto by_head_dim = [&]<typename T, typename S>() {
    return p.pages.head_dim == 64 ? by_vectors.template operator()<T, S, 64>()
                                  : by_vectors.template operator()<T, S, 128>();
  };
  const auto by_summaries = [&]<typename T>() {
    return p.pages.summaries.fp8 ? by_head_dim.template operator()<T, Fp8>() : by_head_dim.template operator()<T, T>();
  };
  return p.pages.dtype == DType::bf16 ? by_summaries.template operator()<__nv_bfloat16>()
                                      : by_summaries.template operator()<__half>();
}

}  // namespace
}  // namespace flashcore::decode90

namespace flashcore {

bool wgmma_sm90_decode_selects(const SelectAttendParams& params) {
  using namespace decode90;
  const AttendParams& p = params.attend;
  const SelectParams& select = params.select;
  return p.free_cuts && p.batch == 1 && p.num_tokens == 1 && p.num_kv_heads == kClusterHeads &&
         p.num_qo_heads <= kClusterHeads * score::kSlots && !has_top_p(select) &&
         reinterpret_cast<uintptr_t>(select.plan.kv_indices) % 16 == 0 &&
         select.pages.max_columns - select.sparse.sink_pages - select.sparse.recent_pages <= kMostScored &&
         select.sparse.list_pages <= kMostScored && dispatch(select, [](auto launcher) { return launcher.fits(); });
}

int run_select_attend_wgmma_sm90_decode(const SelectAttendParams& params) {
  using namespace decode90;
  const TopkParams topk{make_params(params.attend), params.select, params.tokens, params.early};
  return dispatch(params.select, [&](auto launcher) { return launcher.run(topk); });
}

}  // namespace flashcore
