// Merge of split keys and shared prefixes: combines the partial results of each query, in the order of merge_order.h.
//
//   M = max lse_n;  w_n = 2^(lse_n - M);  out = sum(w_n o_n) / sum(w_n);  lse = M + log2(sum(w_n))
//
// A decode step has few queries, each with up to hundreds of partial results, and only latency counts. Grid: one CTA of
// four warps a (token, query head); where there are many, one warp; where there are very many, one warp a (token, KV
// head). A mixed batch or a prefill has many queries, most of which were written directly, and the others have few
// partial results. Grid: as many warps as the GPU holds, each for up to 32 (token, query head) items, of which a lane
// finds out about one; then eight lanes merge an item that has few, all of them one that has many.
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

// Whether the attention before has left nothing, and has merged by itself.
__device__ __forceinline__ bool is_merged(const AttendParams& p) {
  return p.merges == Merges::packed && p.plan.counts[kRowsPacked] == 0;
}

constexpr int kWarps = 4;
constexpr int kHeld = 4;              // partial results of an item whose place a lane finds before the wait
constexpr int kAtOnce = 8;            // rows a warp has in flight
constexpr int kManyItems = 1024;      // of a decode step: from here on a warp takes a query head alone
constexpr int kVeryManyItems = 8192;  // from here on all query heads of a KV head
constexpr int kFewLanes = 8;          // that merge an item of few partial results
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

// Merges `heads` query heads of one KV head one by one: their partial results stand side by side. kShare warps work on
// a head together, each on the sums n % kMergeSums of its own.
template <typename Element, int kHeadDim, int kShare>
__device__ __forceinline__ void merge_heads(const AttendParams& p, int first_item, int heads) {
  constexpr int kOwnSums = kMergeSums / kShare;
  using Sum = Channels<kHeadDim>;
  __shared__ float shared_sums[kMergeSums][kShare == 1 ? 1 : 32 * Sum::kPerLane];  // [sum][channel of the lane][lane]
  __shared__ float shared_weights[kMergeSums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const bool exists = first_item < p.num_tokens * p.num_qo_heads;

  const PartialList list(p, exists ? first_item : 0);
  int held_rows[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int n = 32 * i + lane;
    held_rows[i] = exists && n < list.total ? list.row(n) : -1;
  }
  const bool wanted = __any_sync(~0u, held_rows[0] >= 0);
  wait_for_primary();
  if (!wanted) return;  // the same in all warps of an item

  const int some_row = __shfl_sync(~0u, held_rows[0], 0);  // read, with weight 0, where there is nothing to read
  for (int head = 0; head < heads; ++head) {
    const auto load = [&](Sum(&rows)[kAtOnce], int row, int n) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int from = __shfl_sync(~0u, row, n + i * kShare + warp % kShare);
        rows[i] = Sum::load(p.partial_o + static_cast<int64_t>((from < 0 ? some_row : from) + head) * kHeadDim);
      }
    };
    const auto lse_of = [&](int row) { return row >= 0 ? p.partial_lse[row + head] : -INFINITY; };
    Sum ahead[kAtOnce];
    load(ahead, held_rows[0], 0);

    // Weights are relative to the highest LSE.
    float held_lse[kHeld];
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) maximum = fmaxf(maximum, held_lse[i] = lse_of(held_rows[i]));
    for (int base = 32 * kHeld; base < list.total; base += 32) maximum = fmaxf(maximum, lse_of(list.row(base + lane)));
    maximum = warp_max(maximum);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;

    Sum sums[kOwnSums] = {};
    float weights[kOwnSums] = {};
    const auto add = [&](const Sum(&rows)[kAtOnce], float weight, int n) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float w = __shfl_sync(~0u, weight, n + i * kShare + warp % kShare);
        weights[i % kOwnSums] += w;
        sums[i % kOwnSums].add(w, rows[i]);
      }
    };
    const auto add_32 = [&](int first, int count, int row, float weight) {
      for (int n = first; n < count; n += kAtOnce * kShare) {
        Sum rows[kAtOnce];
        load(rows, row, n);
        add(rows, weight, n);
      }
    };
    const float first_weight = exp2_fast(held_lse[0] - reference);
    add(ahead, first_weight, 0);
    add_32(kAtOnce * kShare, min(32, list.total), held_rows[0], first_weight);
#pragma unroll
    for (int i = 1; i < kHeld; ++i) {
      add_32(0, min(32, list.total - 32 * i), held_rows[i], exp2_fast(held_lse[i] - reference));
    }
    for (int base = 32 * kHeld; base < list.total; base += 32) {
      const int row = list.row(base + lane);
      add_32(0, min(32, list.total - base), row, exp2_fast(lse_of(row) - reference));
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
    write_merged<Element>(p, first_item + head, all, all_weights, maximum);
  }
}

// ------------------------------------------------------------------------------------- few partials

// Merges an item of at most kMergeSums partial results, one to a sum, with kFewLanes lanes. Negative rows: none.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void merge_few(const AttendParams& p, int item, const int (&rows)[kMergeSums]) {
  float weights[kMergeSums];
  float maximum = -INFINITY;
#pragma unroll
  for (int n = 0; n < kMergeSums; ++n) {
    weights[n] = rows[n] >= 0 ? p.partial_lse[rows[n]] : -INFINITY;
    maximum = fmaxf(maximum, weights[n]);
  }
  const float reference = maximum == -INFINITY ? 0.0f : maximum;
#pragma unroll
  for (float& x : weights) x = exp2_fast(x - reference);
  const float weight = add_merge_sums(weights[0], weights[1], weights[2], weights[3]);
  const float inverse = inverse_or_zero(weight);

  const int lane = threadIdx.x % kFewLanes;
#pragma unroll
  for (int d = 4 * lane; d < kHeadDim; d += 4 * kFewLanes) {
    float4 x[kMergeSums];
#pragma unroll
    for (int n = 0; n < kMergeSums; ++n) {
      x[n] = rows[n] >= 0 ? *reinterpret_cast<const float4*>(p.partial_o + int64_t{rows[n]} * kHeadDim + d) : float4{};
    }
    const auto merged = [&](float a, float b, float c, float e) {
      return inverse * add_merge_sums(__fmaf_rn(weights[0], a, 0.0f), __fmaf_rn(weights[1], b, 0.0f),
                                      __fmaf_rn(weights[2], c, 0.0f), __fmaf_rn(weights[3], e, 0.0f));
    };
    *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + int64_t{item} * kHeadDim + d) =
        make_uint2(pack2<Element>(merged(x[0].x, x[1].x, x[2].x, x[3].x), merged(x[0].y, x[1].y, x[2].y, x[3].y)),
                   pack2<Element>(merged(x[0].z, x[1].z, x[2].z, x[3].z), merged(x[0].w, x[1].w, x[2].w, x[3].w)));
  }
  if (p.lse != nullptr && lane == 0) p.lse[item] = maximum + log2_fast(weight);
}

// ----------------------------------------------------------------------------------------- kernels

template <typename Element, int kHeadDim, int kShare>
__global__ void __launch_bounds__(32 * kWarps, ctas_per_sm(kHeadDim))
    merge_decode_kernel(const __grid_constant__ AttendParams p, int heads) {
  if (is_merged(p)) return wait_in_one_cta();
  merge_heads<Element, kHeadDim, kShare>(p, (blockIdx.x * kWarps + threadIdx.x / 32) / kShare * heads, heads);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps, ctas_per_sm(kHeadDim))
    merge_mixed_kernel(const __grid_constant__ AttendParams p, int items_per_warp) {
  const int lane = threadIdx.x % 32;
  const int begin = (blockIdx.x * kWarps + threadIdx.x / 32) * items_per_warp;
  const int end = min(begin + items_per_warp, p.num_tokens * p.num_qo_heads);
  int total = 0, rows[kMergeSums] = {-1, -1, -1, -1};
  if (p.plan.counts[kNumPartials] > 0 && begin + lane < end) {
    const PartialList list(p, begin + lane);
    total = list.total;
#pragma unroll
    for (int n = 0; n < kMergeSums; ++n) rows[n] = n < total ? list.row(n) : -1;
  }
  unsigned few = __ballot_sync(~0u, rows[0] >= 0 && total <= kMergeSums);
  unsigned many = __ballot_sync(~0u, rows[0] >= 0 && total > kMergeSums);
  wait_for_primary();
  while (few != 0) {
    int item = -1;  // of these lanes
#pragma unroll
    for (int lanes = 0; lanes < 32 / kFewLanes; ++lanes) {
      if (lanes == lane / kFewLanes) item = __ffs(few) - 1;
      few &= few - 1;
    }
    int its_rows[kMergeSums];
#pragma unroll
    for (int n = 0; n < kMergeSums; ++n) its_rows[n] = __shfl_sync(~0u, rows[n], max(item, 0));
    if (item >= 0) merge_few<Element, kHeadDim>(p, begin + item, its_rows);
  }
  for (; many != 0; many &= many - 1) merge_heads<Element, kHeadDim, 1>(p, begin + __ffs(many) - 1, 1);
}

// ---------------------------------------------------------------------------------------- launcher

template <typename Element, int kHeadDim>
int launch(const AttendParams& p) {
  const int items = p.num_tokens * p.num_qo_heads, pairs = p.num_tokens * p.num_kv_heads;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const auto run = [&](auto kernel, int ctas, int argument) {
    return launch_dependent(kernel, ctas, 32 * kWarps, stream, p, argument);
  };
  if (items == 0) return cudaSuccess;
  if (!p.decode) {
    const int items_per_warp = min(32, ceil_div(items, p.num_sms * ctas_per_sm(kHeadDim) * kWarps));
    return run(merge_mixed_kernel<Element, kHeadDim>, ceil_div(items, items_per_warp * kWarps), items_per_warp);
  }
  if (items >= kVeryManyItems) {
    return run(merge_decode_kernel<Element, kHeadDim, 1>, ceil_div(pairs, kWarps), items / pairs);
  }
  if (items >= kManyItems) return run(merge_decode_kernel<Element, kHeadDim, 1>, ceil_div(items, kWarps), 1);
  return run(merge_decode_kernel<Element, kHeadDim, kWarps>, items, 1);
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
