// The pages that each sparse request and KV head reads: those of the best scores (score.cuh), in the order of the
// sequence.
//
// Grid one CTA for each request and KV head, of 1024 threads, or of 256 where that many do not fit the GPU at a time.
// Each thread has a stretch of neighbouring columns: keys of 4096 in registers, page ids in shared memory; longer
// requests read theirs from L2. While the scores are still made a CTA
// writes the summary of its request's last page if the step has filled it, and all of the list that needs no score.
// Then the key of the last page that fits the budget is found by a radix select over the range that the keys really
// span: 2048 counts a round, each round narrowing the range to one bucket until all or one key of it is wanted (two
// rounds as a rule, three at most). The list is then written by a prefix sum over the columns: no sort, and ties go to
// the lower column.
#include <cuda_runtime.h>

#include "device/dependent_launch.cuh"
#include "plan/cta.cuh"
#include "summary/summarize.cuh"

namespace flashcore {

cudaError_t launch_score_bf16(const SelectParams& p);
cudaError_t launch_score_fp16(const SelectParams& p);

namespace {

constexpr int kMostThreads = 1024, kCtasPerSm = 2;
constexpr int kFewerThreads = 256, kMoreCtasPerSm = 6;
constexpr int kBucketBits = 11;
constexpr int kBuckets = 1 << kBucketBits;
constexpr int kStaged = 4096;

// How many columns stand before one in the list: those of a higher key, and those of just the threshold's.
struct Places {
  int32_t better, ties;

  __device__ Places operator+(const Places& other) const { return {better + other.better, ties + other.ties}; }
};

struct Shared {
  alignas(16) int32_t table[kStaged];  // page ids; before them the keys of the page that is summarised
  int32_t counts[kBuckets];            // 0 but during a round
  uint32_t lowest[kMostThreads / kWarp], highest[kMostThreads / kWarp];
  int32_t sums[kMostThreads / kWarp];
  Places places[kMostThreads / kWarp];
  int32_t all_mass, chosen;  // top-p
  struct {
    int32_t bucket, wanted, inside;
  } found;
};

__device__ int32_t warp_sum(int32_t value) { return __reduce_add_sync(~0u, value); }
__device__ Places warp_sum(const Places& value) { return {warp_sum(value.better), warp_sum(value.ties)}; }

// Sum over the threads before this one; all threads call. `sums` is free again behind the next __syncthreads().
template <class T>
__device__ T sum_before(T value, T* sums) {
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T through = warp_scan(value);
  if (lane == kWarp - 1) sums[warp] = through;
  __syncthreads();
  return warp_sum(lane < warp ? sums[lane] : T{}) + shuffle_up(through, 1);
}

// The middle columns of one request and KV head, of which the thread has the stretch [begin, end).
template <int kThreads_>
struct Columns {
  static constexpr int kThreads = kThreads_, kWarps = kThreads / kWarp;
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

// A column is chosen if its key is higher, or if it is among the first `ties` of just this key.
struct Threshold {
  uint32_t key;
  int32_t ties;
};

// The lowest and the highest key.
template <class Columns>
__device__ uint2 key_range(const Columns& columns, Shared& shared) {
  uint32_t lowest = ~0u, highest = 0;
  columns.for_each([&](uint32_t key, int32_t) {
    lowest = min(lowest, key);
    highest = max(highest, key);
  });
  lowest = __reduce_min_sync(~0u, lowest);
  highest = __reduce_max_sync(~0u, highest);
  if (threadIdx.x % kWarp == 0) {
    shared.lowest[threadIdx.x / kWarp] = lowest;
    shared.highest[threadIdx.x / kWarp] = highest;
  }
  __syncthreads();
  const int32_t warp = threadIdx.x % Columns::kWarps;
  return {__reduce_min_sync(~0u, shared.lowest[warp]), __reduce_max_sync(~0u, shared.highest[warp])};
}

// Of two thresholds the one that lets fewer columns pass.
__device__ Threshold stricter(const Threshold& a, const Threshold& b) {
  return a.key > b.key || (a.key == b.key && a.ties < b.ties) ? a : b;
}

// The columns of the highest keys whose sizes (of 1 at least, equal for equal keys) add up to `wanted`.
template <class Columns, class Size>
__device__ Threshold find_threshold(const Columns& columns, uint2 range, int32_t wanted, Shared& shared, Size size) {
  uint32_t low = range.x, span = range.y - range.x;  // keys low .. low + span are left
  while (true) {
    const int32_t shift = max(kWarp - __clz(span) - kBucketBits, 0);
    columns.for_each([&](uint32_t key, int32_t) {
      const uint32_t offset = key - low;
      if (offset <= span) atomicAdd(shared.counts + (offset >> shift), size(key));
    });
    __syncthreads();
    // The bucket, counted from the top, in which the wanted page is; a thread has kEach of them.
    constexpr int32_t kEach = kBuckets / Columns::kThreads;
    const int32_t top = kBuckets - 1 - static_cast<int32_t>(threadIdx.x) * kEach;
    int32_t inside[kEach], own = 0;
#pragma unroll
    for (int32_t i = 0; i < kEach; ++i) {
      own += inside[i] = shared.counts[top - i];
      shared.counts[top - i] = 0;
    }
    int32_t above = sum_before(own, shared.sums);
#pragma unroll
    for (int32_t i = 0; i < kEach; ++i) {
      if (above < wanted && wanted <= above + inside[i]) shared.found = {top - i, wanted - above, inside[i]};
      above += inside[i];
    }
    __syncthreads();
    low += static_cast<uint32_t>(shared.found.bucket) << shift;
    span = (1u << shift) - 1;
    wanted = shared.found.wanted;
    if (wanted == shared.found.inside) return {low, INT32_MAX};  // the whole bucket
    if (shift == 0) return {low, ceil_div(wanted, size(low))};
  }
}

// The columns that the budget has room for, or with top-p those of them that are enough.
template <bool kTopP, class Columns>
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

// Returns, in the last thread, how many columns are listed.
template <class Columns>
__device__ int32_t write_list(const Columns& columns, Threshold threshold, int32_t* list, Shared& shared) {
  const auto place = [&](uint32_t key) { return Places{key > threshold.key, key == threshold.key}; };
  Places before{};
  columns.for_each([&](uint32_t key, int32_t) { before = before + place(key); });
  before = sum_before(before, shared.places);
  columns.for_each([&](uint32_t key, int32_t i) {
    const Places own = place(key);
    if (own.better || (own.ties && before.ties < threshold.ties)) {
      list[before.better + min(before.ties, threshold.ties)] = columns.page(i);
    }
    before = before + own;
  });
  return before.better + min(before.ties, threshold.ties);
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

// The summary of a page that the step has filled. All threads fetch its keys; one sums up a channel.
template <class T, class S>
__device__ void fill_summary(const SummarizeParams& p, int64_t page, int32_t kv_head, Shared& shared) {
  const int32_t blocks = p.head_dim / kBlock;
  const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + kv_head * p.k_stride_head;
  int64_t stride = p.k_stride_token;
  if (p.page_size * p.head_dim * sizeof(T) <= sizeof(shared.table)) {
    T* staged = reinterpret_cast<T*>(shared.table);
    for (int32_t i = threadIdx.x; i < p.page_size * blocks; i += blockDim.x) {
      const Block<T> block = load_block(k + i / blocks * stride + i % blocks * kBlock);
      *reinterpret_cast<Block<T>*>(staged + i * kBlock) = block;
    }
    k = staged;
    stride = p.head_dim;
  }
  __syncthreads();
  for (int32_t channel = threadIdx.x; channel < p.head_dim; channel += blockDim.x) {
    summarize_channels<1, T, S>(p, k + channel, stride, p.page_size, page, kv_head, channel);
  }
  __syncthreads();
}

template <class T, class S, bool kTopP, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kMostThreads ? kCtasPerSm : kMoreCtasPerSm)
    select_kernel(SelectParams p) {
  __shared__ Shared shared;
  allow_dependents();
  for (int32_t i = threadIdx.x; i < kBuckets; i += kThreads) shared.counts[i] = 0;
  const int32_t r = blockIdx.x / p.pages.num_kv_heads, kv_head = blockIdx.x % p.pages.num_kv_heads;
  const int32_t filled = filled_page(p.pages, r);
  if (filled >= 0) fill_summary<T, S>(p.pages, filled, kv_head, shared);
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
  const int32_t chosen = write_list(columns, threshold, list + p.sparse.sink_pages, shared);
  if constexpr (!kTopP) return;
  if (threadIdx.x == kThreads - 1) shared.chosen = chosen;
  __syncthreads();
  end_list(p, choice, r, kv_head, shared.chosen);
}

}  // namespace

int run_select_cuda(const SelectParams& p) {
  if (p.pages.batch == 0) return 0;
  return with_elements(p.pages, [&](auto key, auto summary) {
    const cudaError_t error = p.pages.dtype == DType::bf16 ? launch_score_bf16(p) : launch_score_fp16(p);
    if (error != cudaSuccess) return error;
    const auto launch = [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value;
      const auto kernel = has_top_p(p) ? select_kernel<decltype(key), decltype(summary), true, kThreads>
                                       : select_kernel<decltype(key), decltype(summary), false, kThreads>;
      return launch_dependent(kernel, p.pages.batch * p.pages.num_kv_heads, kThreads,
                              static_cast<cudaStream_t>(p.pages.stream), p);
    };
    const bool fits = p.pages.batch * p.pages.num_kv_heads <= kCtasPerSm * p.num_sms;
    return fits ? launch(std::integral_constant<int, kMostThreads>{})
                : launch(std::integral_constant<int, kFewerThreads>{});
  });
}

}  // namespace flashcore
