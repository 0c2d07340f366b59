// The pages that each sparse request and KV head reads: those of the best scores (score.cuh), in the order of the
// sequence.
//
// Grid one CTA for each request and KV head, of 1024 threads, or of 256 where that many do not fit the GPU at a time.
// Each thread has a stretch of neighbouring columns: keys of 4096 in registers, page ids in shared memory; longer
// requests read theirs from L2. While the scores are still made a CTA writes all of the list that needs no score. Then
// the key of the last page that fits the budget is found (threshold.cuh), and the list written by a prefix sum over the
// columns: no sort, and ties go to the lower column.
#include <cuda_runtime.h>

#include <type_traits>

#include "device/dependent_launch.cuh"
#include "plan/cta.cuh"
#include "summary/rules.h"
#include "summary/threshold.cuh"

namespace flashcore {

cudaError_t launch_score_bf16(const SelectParams& p);
cudaError_t launch_score_fp16(const SelectParams& p);

namespace {

constexpr int kMostThreads = 1024, kCtasPerSm = 2;
constexpr int kFewerThreads = 256, kMoreCtasPerSm = 6;
constexpr int kBucketBits = 11;
constexpr int kStaged = 4096;

template <int kThreads>
struct Shared : Counts<kThreads, kBucketBits> {
  int32_t table[kStaged];    // page ids
  int32_t all_mass, chosen;  // top-p
};

// The middle columns of one request and KV head, of which the thread has the stretch [begin, end).
template <int kThreads_>
struct Columns {
  static constexpr int kThreads = kThreads_;
  static constexpr int kHeld = kThreads == kMostThreads ? 4 : 8;

  const float* scores;
  const int32_t* table;
  int32_t* staged;  // a copy of the table, where there is room
  int32_t all, begin, end;
  uint32_t keys[kHeld];  // the first ones of the stretch

  __device__ Columns(const float* scores, const int32_t* table, int32_t* staged, int32_t all)
      : scores(scores), table(table), staged(staged), all(all) {
    const int32_t each = ceil_div(all, kThreads);
    begin = min(static_cast<int32_t>(threadIdx.x) * each, all);
    end = min(begin + each, all);
  }
  __device__ void stage_table() const {
    for (int32_t i = threadIdx.x; i < min(all, kStaged); i += kThreads) staged[i] = table[i];
  }
  __device__ int32_t page(int32_t i) const { return all <= kStaged ? staged[i] : table[i]; }
  __device__ void load_keys() {
#pragma unroll
    for (int32_t i = 0; i < kHeld; ++i) keys[i] = begin + i < end ? sort_key(scores[begin + i]) : 0;
  }
  // f(key, i) for each column of the stretch.
  template <class F>
  __device__ void for_each(F f) const {
#pragma unroll
    for (int32_t i = 0; i < kHeld; ++i) {
      if (begin + i < end) f(keys[i], begin + i);
    }
#pragma unroll 1
    for (int32_t i = begin + kHeld; i < end; ++i) f(sort_key(scores[i]), i);
  }
};

// Of two thresholds the one that lets fewer columns pass.
__device__ Threshold stricter(const Threshold& a, const Threshold& b) {
  return a.key > b.key || (a.key == b.key && a.ties < b.ties) ? a : b;
}

// The columns that the budget has room for, or with top-p those of them that are enough.
template <bool kTopP, class Columns, class Shared>
__device__ Threshold choose(const SelectParams& p, const Choice& choice, const Columns& columns, Shared& shared) {
  const uint2 range = key_range(columns, shared);
  const Threshold fits = find_threshold(columns, range, choice.count(p), shared, [](uint32_t) { return 1; });
  if constexpr (!kTopP) return fits;
  const MassRule rule(p, score_of(range.y), choice.columns());
  const auto mass = [&](uint32_t key) { return rule.of(score_of(key)); };
  int32_t own = 0;
  columns.for_each([&](uint32_t key, int32_t) { own += mass(key); });
  const int32_t before = sum_before(own, shared.sums);
  if (threadIdx.x == Columns::kThreads - 1) shared.all_mass = before + own;
  __syncthreads();
  return stricter(fits, find_threshold(columns, range, enough_mass(p, shared.all_mass), shared, mass));
}

// Behind a list that top-p has made shorter: the recent pages, and the end of its tiles.
__device__ void end_list(const SelectParams& p, const Choice& choice, int32_t r, int32_t kv_head, int32_t chosen) {
  const int32_t dropped = choice.count(p) - chosen, recent = p.sparse.recent_pages;
  int32_t* end = list_of(p, r, kv_head) + choice.budget - dropped;
  for (int32_t i = threadIdx.x; i < recent; i += blockDim.x) {
    end[i - recent] = choice.table[choice.pages - recent + i];
  }
  end_tiles(p, r, kv_head, choice.budget - dropped, threadIdx.x, blockDim.x);
  if (threadIdx.x == 0) atomicAdd(p.plan.counts + kPagesDropped, dropped);
}

template <bool kTopP, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kMostThreads ? kCtasPerSm : kMoreCtasPerSm)
    select_kernel(SelectParams p) {
  __shared__ Shared<kThreads> shared;
  allow_dependents();
  shared.clear();
  const int32_t r = blockIdx.x / p.pages.num_kv_heads, kv_head = blockIdx.x % p.pages.num_kv_heads;
  const Choice choice(p, r);
  int32_t* list = list_of(p, r, kv_head);
  Columns<kThreads> columns(scores_of(p, r, kv_head) + choice.middle_begin, choice.table + choice.middle_begin,
                            shared.table, choice.columns());
  if (choice.needed()) {
    for (int32_t i = threadIdx.x; i < p.sparse.sink_pages; i += kThreads) list[i] = choice.table[i];
    for (int32_t i = threadIdx.x; i < p.sparse.recent_pages; i += kThreads) {
      list[choice.budget - p.sparse.recent_pages + i] = choice.table[choice.pages - p.sparse.recent_pages + i];
    }
    columns.stage_table();
  }
  wait_for_primary();  // for the scores; all else is older than their kernel
  if (!choice.needed()) return;
  columns.load_keys();
  const Threshold threshold = choose<kTopP>(p, choice, columns, shared);
  const int32_t chosen = for_each_chosen(columns, threshold, shared, [&](int32_t i, int32_t column) {
    list[p.sparse.sink_pages + i] = columns.page(column);
  });
  if constexpr (!kTopP) return;
  if (threadIdx.x == kThreads - 1) shared.chosen = chosen;
  __syncthreads();
  end_list(p, choice, r, kv_head, shared.chosen);
}

}  // namespace

int run_select_cuda(const SelectParams& p) {
  if (p.pages.batch == 0) return 0;
  const cudaError_t error = p.pages.dtype == DType::bf16 ? launch_score_bf16(p) : launch_score_fp16(p);
  if (error != cudaSuccess) return error;
  const auto launch = [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    const auto kernel = has_top_p(p) ? select_kernel<true, kThreads> : select_kernel<false, kThreads>;
    return launch_dependent(kernel, p.pages.batch * p.pages.num_kv_heads, kThreads,
                            static_cast<cudaStream_t>(p.pages.stream), p);
  };
  const bool fits = p.pages.batch * p.pages.num_kv_heads <= kCtasPerSm * p.num_sms;
  return fits ? launch(std::integral_constant<int, kMostThreads>{})
              : launch(std::integral_constant<int, kFewerThreads>{});
}

}  // namespace flashcore
