// Merge of split keys and shared prefixes: combines the partial results of each query in the order of merge_rows.
//
// Grid: as many warps as the GPU holds, more when a warp would get over 32 (token, query head) items. Block: 4 warps.
// The lanes of a warp ask in parallel which of its items have partial results, so that a prefill, where almost every
// tile wrote its output directly, costs a few loads a warp; then groups of kLanes lanes combine one of these items
// each: the whole warp in decode, where an item may have many partials, 8 lanes in a prefill, where items have few and
// are many.
// The questions are about the plan alone: on Hopper they are asked while the attention kernel still runs.
//
//   M = max lse_i;  w_i = 2^(lse_i - M);  out = sum(w_i o_i) / sum(w_i);  lse = M + log2(sum(w_i))
//
// The order of every sum is that of the plan: equal cuts of the keys give equal bits, whatever else is in the batch.
#include <cuda_runtime.h>

#include "attend/merge_decode.h"
#include "device/dependent_launch.cuh"
#include "device/math.cuh"
#include "params.h"

namespace flashcore {
namespace {

constexpr int kWarps = 4;
constexpr int kWarpsPerSm = 64;  // of the GPU's residency

// ----------------------------------------------------------------------------- what is in the plan

struct TileRange {
  int begin, end, first_row;  // partial row of a tile: tile.partial + first_row
};

// The tiles that entry `index` of merge_rows points at, for one query head.
__device__ __forceinline__ TileRange tiles_of(const AttendParams& p, int index, int head) {
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int2 entry = reinterpret_cast<const int2*>(p.plan.merge_rows)[index];
  const int32_t* indptr = p.plan.tile_indptr + entry.x * p.num_kv_heads + head / group;
  return {indptr[0], indptr[1], entry.y * group + head % group};
}

__device__ __forceinline__ bool has_partials(const AttendParams& p, int item) {
  const int token = item / p.num_qo_heads;
  const int begin = p.plan.merge_indptr[token];
  if (begin == p.plan.merge_indptr[token + 1]) return false;
  return p.plan.tiles[tiles_of(p, begin, item % p.num_qo_heads).begin].partial >= 0;
}

// --------------------------------------------------------------------------------------- reduction

// Where a partial result lies, and how it weighs.
struct Partial {
  int row;
  float lse;
};

// Calls visit(partial of this lane, how many lanes hold one) for every kLanes partial results of a query, in order.
template <int kLanes, typename Visit>
__device__ __forceinline__ void for_each_partial(const AttendParams& p, int token, int head, Visit&& visit) {
  const int lane = threadIdx.x % kLanes;
  for (int index = p.plan.merge_indptr[token]; index < p.plan.merge_indptr[token + 1]; ++index) {
    const TileRange tiles = tiles_of(p, index, head);
    for (int tile = tiles.begin; tile < tiles.end; tile += kLanes) {
      Partial partial = {0, -INFINITY};
      if (tile + lane < tiles.end) {
        partial.row = p.plan.tiles[tile + lane].partial + tiles.first_row;
        partial.lse = p.partial_lse[partial.row];
      }
      visit(partial, min(tiles.end - tile, kLanes));
    }
  }
}

// Combines one item with kLanes lanes, each of which holds kVectors float4 of the head dimension. The maximum is known
// before the sums begin, so their order, and every bit of them, is the same for any kLanes.
template <typename Element, int kHeadDim, int kLanes>
__device__ __forceinline__ void combine(const AttendParams& p, int item) {
  constexpr int kVectors = (kHeadDim + 4 * kLanes - 1) / (4 * kLanes);
  constexpr int kUnroll = kVectors < 8 ? 8 / kVectors : 1;
  const int token = item / p.num_qo_heads, head = item % p.num_qo_heads, lane = threadIdx.x % kLanes;
  const unsigned group = (~0u >> (32 - kLanes)) << (threadIdx.x % 32 - lane);

  float max = -INFINITY;
  for_each_partial<kLanes>(p, token, head, [&](Partial partial, int) { max = fmaxf(max, partial.lse); });
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(group, max, step));

  float sum = 0.0f;
  float4 o[kVectors] = {};
  auto dim = [&](int vector) { return 4 * (lane + kLanes * vector); };
  for_each_partial<kLanes>(p, token, head, [&](Partial partial, int count) {
    const float weight = max == -INFINITY ? 0.0f : exp2_fast(partial.lse - max);
#pragma unroll kUnroll
    for (int i = 0; i < count; ++i) {
      const float w = __shfl_sync(group, weight, i, kLanes);
      const float* from = p.partial_o + int64_t{__shfl_sync(group, partial.row, i, kLanes)} * kHeadDim;
      sum += w;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (dim(v) >= kHeadDim) continue;
        const float4 x = *reinterpret_cast<const float4*>(from + dim(v));
        o[v].x += w * x.x;
        o[v].y += w * x.y;
        o[v].z += w * x.z;
        o[v].w += w * x.w;
      }
    }
  });

  const float normalise = sum > 0.0f ? 1.0f / sum : 0.0f;
  auto* out = static_cast<Element*>(p.out) + int64_t{item} * kHeadDim;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (dim(v) >= kHeadDim) continue;
    *reinterpret_cast<uint2*>(out + dim(v)) = make_uint2(pack2<Element>(o[v].x * normalise, o[v].y * normalise),
                                                         pack2<Element>(o[v].z * normalise, o[v].w * normalise));
  }
  if (p.lse != nullptr && lane == 0) p.lse[item] = sum > 0.0f ? max + log2f(sum) : -INFINITY;
}

// ------------------------------------------------------------------------------------------ kernel

template <typename Element, int kHeadDim, int kLanes>
__global__ void __launch_bounds__(32 * kWarps, 6)
    merge_kernel(const __grid_constant__ AttendParams p, int items_per_warp) {
  const int lane = threadIdx.x % 32;
  const int begin = (blockIdx.x * kWarps + threadIdx.x / 32) * items_per_warp;
  const int end = min(begin + items_per_warp, p.num_tokens * p.num_qo_heads);
  const bool mergeable = p.plan.counts[kNumPartials] > 0 && begin + lane < end;
  unsigned left = __ballot_sync(~0u, mergeable && has_partials(p, begin + lane));
  wait_for_primary();
  while (left != 0) {
    int mine = 0;  // one more than the bit of this lane's group
#pragma unroll
    for (int group = 0; group < 32 / kLanes; ++group) {
      if (group == lane / kLanes) mine = __ffs(left);
      left &= left - 1;
    }
    if (mine != 0) combine<Element, kHeadDim, kLanes>(p, begin + mine - 1);
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename Element, int kHeadDim>
int launch(const AttendParams& p) {
  const int items = p.num_tokens * p.num_qo_heads;
  if (items == 0) return cudaSuccess;
  const int items_per_resident_warp = (items + p.num_sms * kWarpsPerSm - 1) / (p.num_sms * kWarpsPerSm);
  const int items_per_warp = items_per_resident_warp < 32 ? items_per_resident_warp : 32;
  const int ctas = (items + items_per_warp * kWarps - 1) / (items_per_warp * kWarps);
  const auto kernel = p.decode ? merge_kernel<Element, kHeadDim, 32> : merge_kernel<Element, kHeadDim, 8>;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  return launch_dependent(kernel, ctas, 32 * kWarps, stream, p, items_per_warp);
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
  if (p.decode && can_merge_decode(p)) return run_merge_decode_cuda(p);
  if (p.dtype == DType::bf16) return launch_head_dim<__nv_bfloat16>(p);
  if (p.dtype == DType::fp16) return launch_head_dim<__half>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flashcore
