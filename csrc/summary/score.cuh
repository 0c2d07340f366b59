// Scores of pages by their summaries (the formula: rules.h), on tensor cores, at the speed that memory gives the
// summaries. What is scored together: score_units.cuh; how: score_product.cuh.
//
// Grid    a warp for each unit that there may be, if that is up to four CTAs an SM: it knows its unit without a look at
//         the batch. Else two CTAs an SM, and every warp takes an even piece of the line of all units, so that a shared
//         page is read once for 64 query heads.
// Shared  a ring of units for each warp (where it has one, that), filled by cp.async.
#pragma once

#include <cuda_runtime.h>

#include "arithmetic.h"
#include "device/dependent_launch.cuh"
#include "summary/score_product.cuh"

namespace flashcore::score {

constexpr int kCtasPerSm = 2;
constexpr int kFewCtasPerSm = 4;  // where a warp has one unit
constexpr int kLineBytes = 128;

// Page ids are known to be wanted before it is known which: a line a warp comes to L2 beside the first loads.
__device__ inline void prefetch_ids(const SelectParams& p, int32_t warp) {
  const int32_t ids = warp * (kLineBytes / static_cast<int32_t>(sizeof(int32_t)));
  if (threadIdx.x % kWarp == 0 && ids < p.sparse.begin) prefetch_l2(p.plan.kv_indices + ids);
}

// A warp for each unit that there may be.
struct FewUnits {
  Divisor by_units, by_heads;

  explicit FewUnits(const SelectParams& p)
      : by_units(ceil_div(p.pages.max_columns, kPages)), by_heads(p.pages.num_kv_heads) {}
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kFewCtasPerSm) score_few_kernel(SelectParams p, FewUnits few) {
  extern __shared__ __align__(16) unsigned char storage[];
  auto& stages = reinterpret_cast<typename Traits::Stage(&)[Traits::kWarps]>(storage);
  const int32_t warp = blockIdx.x * Traits::kWarps + threadIdx.x / kWarp;
  prefetch_ids(p, warp);
  wait_for_primary();
  allow_dependents();  // behind the wait, so that select finds all that is older than this kernel finished
  const int32_t pair = warp / few.by_units, r = pair / few.by_heads;
  if (r >= p.pages.batch) return;
  const Span span = Span::of_request(p, r);
  const int32_t unit = warp % few.by_units;
  if (unit >= span.units) return;
  const Place at = {pair % few.by_heads, p.sparse.sink_pages + unit * kPages, span.end};
  auto& stage = stages[threadIdx.x / kWarp];
  const Scorer<Traits> scorer(p, Slots(p));
  scorer.copy_summaries(scorer.load_id(span.table, at), at.kv_head, stage);
  copy_async_commit();
  Members members;
  members.load_alone(p, r);
  Queries<Traits> queries;
  scorer.template score<0>(at, members, stage, queries, false);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kCtasPerSm) score_kernel(SelectParams p) {
  extern __shared__ __align__(16) unsigned char storage[];
  constexpr int kStages = Traits::kStages;
  auto& ring = reinterpret_cast<typename Traits::Ring(&)[Traits::kWarps]>(storage)[threadIdx.x / kWarp];
  const int32_t warps = gridDim.x * Traits::kWarps, warp = blockIdx.x * Traits::kWarps + threadIdx.x / kWarp;
  prefetch_ids(p, warp);
  wait_for_primary();
  allow_dependents();  // as above
  const Line line(p);
  const int32_t all = line.units(), each = all / warps, more = all - each * warps;
  const int32_t units = each + (warp < more);
  if (units == 0) return;
  const Scorer<Traits> scorer(p, line.slots);
  Cursor now(line, warp * each + min(warp, more)), ahead = now;
  int32_t ids = scorer.load_id(ahead.span.table, ahead.place(p)), fetched = 0;  // of the unit that is fetched next
  const auto fetch = [&] {
    if (fetched < units) {
      scorer.copy_summaries(ids, ahead.kv_head, ring[fetched % kStages]);
      if (++fetched < units) {
        ahead.advance(line);
        ids = scorer.load_id(ahead.span.table, ahead.place(p));
      }
    }
    copy_async_commit();  // an empty group at the end, so that the count of groups stays that of units
  };
  Members members;
  Queries<Traits> queries;
  bool there = false;  // whether the queries are the first ones of `now`
  // One loop, also for the first fetches: between two layers the caches lose the code, and each copy of a part of it
  // would come from memory once more.
#pragma unroll 1
  for (int32_t i = 1 - kStages; i < units; ++i) {
    fetch();
    if (i < 0) continue;
    if (!there) members.load(line, now);
    scorer.template score<kStages - 1>(now.place(p), members, ring[i % kStages], queries, there);
    there = i + 1 < units && !now.advance(line) && line.slots.products(members.count) == 1;
  }
}

template <class T, class S, int kChunks, int kVectors>
cudaError_t launch(const SelectParams& p) {
  using Units = Traits<T, S, kChunks, kVectors>;
  static const cudaError_t opt_in =
      cudaFuncSetAttribute(score_kernel<Units>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
  if (opt_in != cudaSuccess) return opt_in;
  const auto stream = static_cast<cudaStream_t>(p.pages.stream);
  const int64_t most_units = int64_t{p.pages.batch} * p.pages.num_kv_heads * ceil_div(p.pages.max_columns, kPages);
  if (most_units <= kFewCtasPerSm * Units::kWarps * p.num_sms) {
    return launch_dependent_shared(score_few_kernel<Units>, ceil_div(static_cast<int32_t>(most_units), Units::kWarps),
                                   Units::kThreads, Units::kWarps * sizeof(typename Units::Stage), stream, p,
                                   FewUnits(p));
  }
  return launch_dependent_shared(score_kernel<Units>, kCtasPerSm * p.num_sms, Units::kThreads,
                                 Units::kWarps * sizeof(typename Units::Ring), stream, p);
}

template <class T, class S, int kChunks>
cudaError_t dispatch_vectors(const SelectParams& p) {
  return p.pages.summaries.vectors() == 2 ? launch<T, S, kChunks, 2>(p) : launch<T, S, kChunks, 1>(p);
}

template <class T, class S>
cudaError_t dispatch(const SelectParams& p) {
  const int32_t chunks = ceil_div(p.pages.head_dim, kLanes * kBlock);
  if (chunks <= 2) return dispatch_vectors<T, S, 2>(p);
  if (chunks <= 4) return dispatch_vectors<T, S, 4>(p);
  return chunks <= 8 ? dispatch_vectors<T, S, 8>(p) : cudaErrorInvalidValue;
}

}  // namespace flashcore::score
