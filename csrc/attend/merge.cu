// Merge of split keys and shared prefixes: combines the partial results of each query, in the order of merge_order.h.
//
//   M = max lse_n;  w_n = 2^(lse_n - M);  out = sum(w_n o_n) / sum(w_n);  lse = M + log2(sum(w_n))
//
// A decode step has few queries, each with up to hundreds of partial results, and only latency counts. Grid: one CTA of
// four warps a (token, query head) item; where there are many, one warp. A prefill, a mixed batch, or a decode step of
// hundreds of requests has many more items, most of them written directly, or of few partial results. Grid: as many
// warps as the GPU holds, each for up to 32 items, of which a lane finds out about one; then eight lanes merge an item
// that has few, all of them one that has many.
//
// Code is short, 13 KB, since it comes from memory as well: with searches and sums unrolled it was 39 KB, which cost up
// to 2 us where attention's code and this did not fit into the instruction caches together (some 64 KB).
//
// The merge begins while the attention still runs (programmatic dependent launch), finds its partial results in the
// plan, and waits only before it reads them; then every load is independent of the others.
#include <cuda_runtime.h>

#include <type_traits>

#include "arithmetic.h"
#include "attend/merge_order.h"
#include "attend/partial_list.cuh"
#include "device/dependent_launch.cuh"
#include "device/math.cuh"
#include "params.h"

namespace flashcore {
namespace {

// Whether another attention has merged by itself. Then this is on a branch beside it, and leaves: the join waits.
__device__ __forceinline__ bool is_merged(const AttendParams& p) {
  return p.merges == Merges::packed && p.plan.counts[kRowsPacked] == 0;
}

constexpr int kWarps = 4;
constexpr int kHeld = 4;              // partial results of an item whose place a lane finds before the wait
constexpr int kAtOnce = 8;            // rows a warp has in flight
constexpr int kManyItems = 1024;      // of a decode step: from here on a warp takes an item alone
constexpr int kVeryManyItems = 8192;  // from here on several, as in a prefill
constexpr int kListed = 16;           // partial results of an item that has few
constexpr int kFewLanes = 8;          // that merge it
static_assert(kListed % kFewLanes == 0 && kListed % kAtOnce == 0 && kAtOnce % kMergeSums == 0);
constexpr int ctas_per_sm(int head_dim) { return head_dim == 256 ? 3 : 5; }

// ------------------------------------------------------------------------------------ many partials

// What a lane holds of a row: neighbouring channels. Of 96 channels the last lanes hold none.
template <int kHeadDim>
struct Channels {
  static constexpr int kPerLane = kHeadDim == 96 ? 4 : kHeadDim / 32;
  float x[kPerLane];

  static __device__ __forceinline__ bool none() {
    return kPerLane * 32 > kHeadDim && threadIdx.x % 32 * kPerLane >= kHeadDim;
  }

  static __device__ __forceinline__ Channels load(const float* row) {
    using Vector = std::conditional_t<kPerLane == 2, float2, float4>;
    constexpr int kWidth = sizeof(Vector) / sizeof(float);
    Channels c;
    if (none()) return Channels{};
#pragma unroll
    for (int v = 0; v < kPerLane / kWidth; ++v) {
      const auto from = reinterpret_cast<const Vector*>(row)[threadIdx.x % 32 * (kPerLane / kWidth) + v];
      c.x[v * kWidth] = from.x;
      c.x[v * kWidth + 1] = from.y;
      if constexpr (kWidth == 4) {
        c.x[v * kWidth + 2] = from.z;
        c.x[v * kWidth + 3] = from.w;
      }
    }
    return c;
  }
  __device__ __forceinline__ void add(float weight, const Channels& other) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] += weight * other.x[i];
  }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// The output of an item from its sums, and its LSE from their weights relative to `maximum`; all lanes of a warp.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void write_merged(const AttendParams& p, int item,
                                             const Channels<kHeadDim> (&sums)[kMergeSums],
                                             const float (&weights)[kMergeSums], float maximum) {
  using Sum = Channels<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const float weight = add_merge_sums(weights[0], weights[1], weights[2], weights[3]);
  const float inverse = inverse_or_zero(weight);
  auto* out = reinterpret_cast<uint32_t*>(static_cast<Element*>(p.out) + static_cast<int64_t>(item) * kHeadDim);
#pragma unroll
  for (int v = 0; v < Sum::kPerLane; v += 2) {
    float x[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      x[e] = add_merge_sums(sums[0].x[v + e], sums[1].x[v + e], sums[2].x[v + e], sums[3].x[v + e]) * inverse;
    }
    if (!Sum::none()) out[(lane * Sum::kPerLane + v) / 2] = pack2<Element>(x[0], x[1]);
  }
  if (p.lse != nullptr && lane == 0) p.lse[item] = maximum + log2_fast(weight);
}

// kShare warps work on an item together, each on the sums n % kMergeSums of its own.
template <typename Element, int kHeadDim, int kShare>
__device__ __forceinline__ void merge_item(const AttendParams& p, int item) {
  constexpr int kOwnSums = kMergeSums / kShare;
  using Sum = Channels<kHeadDim>;
  __shared__ float shared_sums[kMergeSums][kShare == 1 ? 1 : 32 * Sum::kPerLane];  // [sum][channel of the lane][lane]
  __shared__ float shared_weights[kMergeSums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const bool exists = item < p.num_tokens * p.num_qo_heads;

  const PartialList list(p, exists ? item : 0);
  const int total = exists ? list.total : 0;
  // Lane l finds numbers l, 32 + l, ... One copy of the search, so what it finds moves through the registers.
  int held_rows[kHeld];
#pragma unroll
  for (int& row : held_rows) row = -1;
#pragma unroll 1
  for (int i = min(ceil_div(total, 32), kHeld) - 1; i >= 0; --i) {
#pragma unroll
    for (int h = kHeld - 1; h > 0; --h) held_rows[h] = held_rows[h - 1];
    held_rows[0] = 32 * i + lane < total ? list.row(32 * i + lane) : -1;
  }
  const bool wanted = __any_sync(~0u, held_rows[0] >= 0);
  wait_for_primary();
  if (!wanted) return;  // the same in all warps of an item

  const int some_row = __shfl_sync(~0u, held_rows[0], 0);       // read, with weight 0, where there is nothing to read
  const auto load = [&](Sum(&rows)[kAtOnce], int row, int n) {  // numbers n on of the lanes' 32
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int from = __shfl_sync(~0u, row, n + i * kShare + warp % kShare);
      rows[i] = Sum::load(p.partial_o + static_cast<int64_t>(from < 0 ? some_row : from) * kHeadDim);
    }
  };
  const auto lse_of = [&](int row) { return row >= 0 ? p.partial_lse[row] : -INFINITY; };
  Sum rows[kAtOnce];
  load(rows, held_rows[0], 0);

  // Weights are relative to the highest LSE.
  float held_lse[kHeld];
  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) maximum = fmaxf(maximum, held_lse[i] = lse_of(held_rows[i]));
#pragma unroll 1
  for (int base = 32 * kHeld; base < total; base += 32) maximum = fmaxf(maximum, lse_of(list.row(base + lane)));
  maximum = warp_max(maximum);
  const float reference = maximum == -INFINITY ? 0.0f : maximum;

  Sum sums[kOwnSums] = {};
  float weights[kOwnSums] = {};
  int row = held_rows[0];
  float weight = exp2_fast(held_lse[0] - reference);
#pragma unroll 1
  for (int n = 0;;) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float w = __shfl_sync(~0u, weight, n % 32 + i * kShare + warp % kShare);
      weights[i % kOwnSums] += w;
      sums[i % kOwnSums].add(w, rows[i]);
    }
    n += kAtOnce * kShare;
    if (n >= total) break;
    if (n % 32 == 0) {
#pragma unroll
      for (int h = 1; h < kHeld; ++h) {
        held_rows[h - 1] = held_rows[h];
        held_lse[h - 1] = held_lse[h];
      }
      row = n < 32 * kHeld ? held_rows[0] : list.row(n + lane);
      weight = exp2_fast((n < 32 * kHeld ? held_lse[0] : lse_of(row)) - reference);
    }
    load(rows, row, n % 32);
  }

  if constexpr (kShare > 1) {
#pragma unroll
    for (int i = 0; i < Sum::kPerLane; ++i) shared_sums[warp][32 * i + lane] = sums[0].x[i];
    if (lane == 0) shared_weights[warp] = weights[0];
    __syncthreads();
    if (warp != 0) return;
  }
  Sum all[kMergeSums];
  float all_weights[kMergeSums];
#pragma unroll
  for (int i = 0; i < kMergeSums; ++i) {
    if constexpr (kShare > 1) {
#pragma unroll
      for (int c = 0; c < Sum::kPerLane; ++c) all[i].x[c] = shared_sums[i][32 * c + lane];
      all_weights[i] = shared_weights[i];
    } else {
      all[i] = sums[i];
      all_weights[i] = weights[i];
    }
  }
  write_merged<Element>(p, item, all, all_weights, maximum);
}

// ------------------------------------------------------------------------------------- few partials

// The partial results of an item, in the order of the plan, as a lane has found them.
struct FewPartials {
  int total;  // more than kListed: not these alone
  int rows[kListed];
};

// Merges an item of at most kListed partial results with kFewLanes lanes; all lanes of a warp, with items of their own.
// total 0: nothing to merge.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void merge_few(const AttendParams& p, int item, const int* rows, int total) {
  constexpr int kLanesRows = kListed / kFewLanes;  // whose weights a lane holds: lane, lane + kFewLanes, ...
  const int lane = threadIdx.x % kFewLanes;
  float lanes_weights[kLanesRows];
  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kLanesRows; ++i) {
    const int n = i * kFewLanes + lane;
    lanes_weights[i] = n < total ? p.partial_lse[rows[n]] : -INFINITY;
    maximum = fmaxf(maximum, lanes_weights[i]);
  }
#pragma unroll
  for (int step = kFewLanes / 2; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
  const float reference = maximum == -INFINITY ? 0.0f : maximum;
  float weights[kListed], sums[kMergeSums] = {};
#pragma unroll
  for (float& x : lanes_weights) x = exp2_fast(x - reference);
#pragma unroll
  for (int n = 0; n < kListed; ++n) {
    weights[n] = __shfl_sync(~0u, lanes_weights[n / kFewLanes], n % kFewLanes, kFewLanes);
    sums[n % kMergeSums] += weights[n];
  }
  if (total == 0) return;
  const float weight = add_merge_sums(sums[0], sums[1], sums[2], sums[3]);
  const float inverse = inverse_or_zero(weight);

#pragma unroll
  for (int d = 4 * lane; d < kHeadDim; d += 4 * kFewLanes) {
    float4 o[kMergeSums] = {};
#pragma unroll
    for (int first = 0; first < kListed; first += kAtOnce) {
      if (first >= total) break;
      float4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int n = first + i;
        x[i] = n < total ? *reinterpret_cast<const float4*>(p.partial_o + int64_t{rows[n]} * kHeadDim + d) : float4{};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float4& sum = o[i % kMergeSums];
        const float w = weights[first + i];
        sum = make_float4(__fmaf_rn(w, x[i].x, sum.x), __fmaf_rn(w, x[i].y, sum.y), __fmaf_rn(w, x[i].z, sum.z),
                          __fmaf_rn(w, x[i].w, sum.w));
      }
    }
    const auto merged = [&](float a, float b, float c, float e) { return inverse * add_merge_sums(a, b, c, e); };
    *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + int64_t{item} * kHeadDim + d) =
        make_uint2(pack2<Element>(merged(o[0].x, o[1].x, o[2].x, o[3].x), merged(o[0].y, o[1].y, o[2].y, o[3].y)),
                   pack2<Element>(merged(o[0].z, o[1].z, o[2].z, o[3].z), merged(o[0].w, o[1].w, o[2].w, o[3].w)));
  }
  if (p.lse != nullptr && lane == 0) p.lse[item] = maximum + log2_fast(weight);
}

// ----------------------------------------------------------------------------------------- kernels

template <typename Element, int kHeadDim, int kShare>
__global__ void __launch_bounds__(32 * kWarps, ctas_per_sm(kHeadDim))
    merge_decode_kernel(const __grid_constant__ AttendParams p) {
  if (is_merged(p)) return;
  merge_item<Element, kHeadDim, kShare>(p, (blockIdx.x * kWarps + threadIdx.x / 32) / kShare);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps, ctas_per_sm(kHeadDim))
    merge_many_items_kernel(const __grid_constant__ AttendParams p, int items_per_warp) {
  __shared__ FewPartials found[kWarps][32];
  if (is_merged(p)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = (blockIdx.x * kWarps + warp) * items_per_warp;
  const int end = min(begin + items_per_warp, p.num_tokens * p.num_qo_heads);
  int total = 0;
  if (p.plan.counts[kNumPartials] > 0 && begin + lane < end) {
    const PartialList list(p, begin + lane);
    const int first = list.total > 0 ? list.row(0) : -1;
    if (first >= 0) {
      total = list.total;
      found[warp][lane].rows[0] = first;
#pragma unroll 1
      for (int n = 1; n < min(total, kListed); ++n) found[warp][lane].rows[n] = list.row(n);
    }
  }
  found[warp][lane].total = total;
  __syncwarp();
  unsigned few = __ballot_sync(~0u, total > 0 && total <= kListed);
  unsigned many = __ballot_sync(~0u, total > kListed);
  wait_for_primary();
  while (few != 0) {
    int item = -1;  // of these lanes
#pragma unroll
    for (int lanes = 0; lanes < 32 / kFewLanes; ++lanes) {
      if (lanes == lane / kFewLanes) item = __ffs(few) - 1;
      few &= few - 1;
    }
    const FewPartials& its = found[warp][max(item, 0)];
    merge_few<Element, kHeadDim>(p, begin + item, its.rows, item >= 0 ? its.total : 0);
  }
  for (; many != 0; many &= many - 1) merge_item<Element, kHeadDim, 1>(p, begin + __ffs(many) - 1);
}

// ---------------------------------------------------------------------------------------- launcher

template <typename Element, int kHeadDim>
int launch(const AttendParams& p) {
  const int items = p.num_tokens * p.num_qo_heads;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const auto run = [&](auto kernel, int ctas, auto... more) {
    return launch_dependent(kernel, ctas, 32 * kWarps, stream, p, more...);
  };
  if (items == 0) return cudaSuccess;
  if (!p.decode || items >= kVeryManyItems) {
    const int items_per_warp = min(32, ceil_div(items, p.num_sms * ctas_per_sm(kHeadDim) * kWarps));
    return run(merge_many_items_kernel<Element, kHeadDim>, ceil_div(items, items_per_warp * kWarps), items_per_warp);
  }
  if (items >= kManyItems) return run(merge_decode_kernel<Element, kHeadDim, 1>, ceil_div(items, kWarps));
  return run(merge_decode_kernel<Element, kHeadDim, kWarps>, items);
}

template <typename Element>
int launch_head_dim(const AttendParams& p) {
  switch (p.head_dim) {
    case 64:
      return launch<Element, 64>(p);
    case 96:
      return launch<Element, 96>(p);
    case 128:
      return launch<Element, 128>(p);
    case 256:
      return launch<Element, 256>(p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int run_merge_cuda(const AttendParams& p) {
  if (p.dtype == DType::bf16) return launch_head_dim<__nv_bfloat16>(p);
  if (p.dtype == DType::fp16) return launch_head_dim<__half>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flashcore
