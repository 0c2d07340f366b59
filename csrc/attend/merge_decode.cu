// Merge of a decode step: few queries, each with up to hundreds of partial results, where only latency counts.
//
// Grid: one CTA of four warps a (token, query head); where there are many, one warp a (token, KV head). It begins while
// the attention still runs (programmatic dependent launch), finds its partial results in the plan, and waits only
// before it reads them; then every load is independent of the others.
//
//   M = max lse_n;  w_n = 2^(lse_n - M);  out = sum(w_n o_n) / sum(w_n);  lse = M + log2(sum(w_n))
//
// The n-th partial result, counted in the order of the plan, always goes to sum n % 4, and the four sums are added in
// one order: the bits do not depend on how many warps share the work, nor on the rest of the batch.
#include <cuda_runtime.h>

#include <type_traits>

#include "attend/merge_decode.h"
#include "device/dependent_launch.cuh"
#include "device/math.cuh"

namespace flashcore {
namespace {

constexpr int kWarps = 4;
constexpr int kSums = 4;
constexpr int kHeld = 4;              // partial results of an item whose place a lane finds before the wait
constexpr int kAtOnce = 8;            // rows a warp has in flight
constexpr int kManyItems = 1024;      // from here on a warp takes a query head alone
constexpr int kVeryManyItems = 8192;  // from here on all query heads of a KV head

// What a lane holds of a row: kHeadDim / 32 neighbouring channels.
template <int kHeadDim>
struct Channels {
  static constexpr int kPerLane = kHeadDim / 32;
  float x[kPerLane];

  static __device__ __forceinline__ Channels load(const float* row) {
    using Vector = std::conditional_t<kPerLane == 2, float2, float4>;
    constexpr int kWidth = sizeof(Vector) / sizeof(float);
    Channels c;
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

// The partial results of one query, numbered in the order of the plan.
struct PartialList {
  const AttendParams& p;
  int first_entry, end_entry, head, total;

  __device__ __forceinline__ PartialList(const AttendParams& params, int item) : p(params), total(0) {
    const int token = item / p.num_qo_heads;
    head = item % p.num_qo_heads;
    first_entry = p.plan.merge_indptr[token];
    end_entry = p.plan.merge_indptr[token + 1];
    for (int entry = first_entry; entry < end_entry; ++entry) {
      const int2 tiles = tiles_of(entry);
      total += tiles.y - tiles.x;
    }
  }

  // Row of the n-th one in the partial buffers; negative where there is none, or where its tile wrote out directly.
  __device__ __forceinline__ int row(int n) const {
    const int group = p.num_qo_heads / p.num_kv_heads;
    for (int entry = first_entry; entry < end_entry; ++entry) {
      const int2 tiles = tiles_of(entry);
      if (n < tiles.y - tiles.x) {
        const int partial = p.plan.tiles[tiles.x + n].partial;
        return partial < 0 ? -1 : partial + p.plan.merge_rows[2 * entry + 1] * group + head % group;
      }
      n -= tiles.y - tiles.x;
    }
    return -1;
  }

 private:
  __device__ __forceinline__ int2 tiles_of(int entry) const {
    const int group = p.num_qo_heads / p.num_kv_heads;
    const int pair = p.plan.merge_rows[2 * entry] * p.num_kv_heads + head / group;
    return make_int2(p.plan.tile_indptr[pair], p.plan.tile_indptr[pair + 1]);
  }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// kShare warps share a query head, each takes the sums n % kSums of its own; kShare 1: a warp takes the `heads` query
// heads of a KV head one by one, their partial results stand side by side.
template <typename Element, int kHeadDim, int kShare>
__global__ void __launch_bounds__(32 * kWarps, kHeadDim == 256 ? 3 : 5)
    merge_decode_kernel(const __grid_constant__ AttendParams p, int heads) {
  constexpr int kOwnSums = kSums / kShare;
  using Sum = Channels<kHeadDim>;
  __shared__ float shared_sums[kSums][kShare == 1 ? 1 : kHeadDim];  // [sum][channel of the lane * 32 + lane]
  __shared__ float shared_weights[kSums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_item = (blockIdx.x * kWarps + warp) / kShare * heads;
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

    Sum sums[kOwnSums];
    float weights[kOwnSums];
#pragma unroll
    for (int i = 0; i < kOwnSums; ++i) {
      weights[i] = 0.0f;
#pragma unroll
      for (float& x : sums[i].x) x = 0.0f;
    }
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
    Sum all[kSums];
    float all_weights[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if constexpr (kShare > 1) {
#pragma unroll
        for (int c = 0; c < Sum::kPerLane; ++c) all[i].x[c] = shared_sums[i][32 * c + lane];
        all_weights[i] = shared_weights[i];
      } else {
        all[i] = sums[i];
        all_weights[i] = weights[i];
      }
    }
    const int item = first_item + head;
    const float weight = (all_weights[0] + all_weights[1]) + (all_weights[2] + all_weights[3]);
    const float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
    auto* out = reinterpret_cast<uint32_t*>(static_cast<Element*>(p.out) + static_cast<int64_t>(item) * kHeadDim);
#pragma unroll
    for (int v = 0; v < Sum::kPerLane; v += 2) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = ((all[0].x[v + e] + all[1].x[v + e]) + (all[2].x[v + e] + all[3].x[v + e])) * inverse;
      }
      out[(lane * Sum::kPerLane + v) / 2] = pack2<Element>(x[0], x[1]);
    }
    if (p.lse != nullptr && lane == 0) p.lse[item] = weight > 0.0f ? maximum + log2f(weight) : -INFINITY;
  }
}

template <typename Element, int kHeadDim>
int launch(const AttendParams& p) {
  const int items = p.num_tokens * p.num_qo_heads;
  if (items == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (items >= kManyItems) {
    const int heads = items >= kVeryManyItems ? p.num_qo_heads / p.num_kv_heads : 1;
    const int ctas = (items / heads + kWarps - 1) / kWarps;
    return launch_dependent(merge_decode_kernel<Element, kHeadDim, 1>, ctas, 32 * kWarps, stream, p, heads);
  }
  return launch_dependent(merge_decode_kernel<Element, kHeadDim, kWarps>, items, 32 * kWarps, stream, p, 1);
}

template <typename Element>
int launch_head_dim(const AttendParams& p) {
  switch (p.head_dim) {
    case 64:
      return launch<Element, 64>(p);
    case 128:
      return launch<Element, 128>(p);
    case 256:
      return launch<Element, 256>(p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool can_merge_decode(const AttendParams& p) { return p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256; }

int run_merge_decode_cuda(const AttendParams& p) {
  if (p.dtype == DType::bf16) return launch_head_dim<__nv_bfloat16>(p);
  if (p.dtype == DType::fp16) return launch_head_dim<__half>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flashcore
