// Merge of split keys and shared prefixes: combines the partial results of each query in the order of merge_rows.
//
// Grid: as many warps as the GPU holds, more when a warp would get over 32 (token, query head) items. Block: 4 warps.
// The lanes of a warp ask in parallel which of its items have partial results, so that a prefill, where almost every tile
// wrote its output directly, costs a few loads a warp; then the whole warp combines these items, one after the other.
//
//   M = max lse_i;  w_i = 2^(lse_i - M);  out = sum(w_i o_i) / sum(w_i);  lse = M + log2(sum(w_i))
//
// The order of every sum is that of the plan: equal plans give equal bits.
#include <cuda_runtime.h>

#include "device/math.cuh"
#include "params.h"

namespace flashcore {
namespace {

constexpr int kWarps = 4;
constexpr int kWarpsPerSm = 64;  // of the GPU's residency

// ------------------------------------------------------------------------------------------------------ the plan's view

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

// --------------------------------------------------------------------------------------------------------- the reduction

// Running sum over partial rows; each lane holds kVectors float4 of the head dimension.
template <int kHeadDim>
struct Combination {
  static constexpr int kVectors = (kHeadDim + 127) / 128;
  float max = -INFINITY, sum = 0.0f;
  float4 o[kVectors] = {};

  static __device__ __forceinline__ int dim(int vector) { return 4 * (threadIdx.x % 32) + 128 * vector; }

  // Adds up to 32 partial rows: lane i knows (row, lse) of the i-th, rows beyond `count` are ignored.
  __device__ __forceinline__ void add(const float* partial_o, int row, float lse, int count) {
    const float new_max = fmaxf(max, warp_max(lse));
    if (new_max == -INFINITY) return;  // none of them saw a key
    const float factor = exp2_fast(max - new_max);
    max = new_max;
    sum *= factor;
#pragma unroll
    for (float4& x : o) x = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
    const float weight = exp2_fast(lse - new_max);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float w = __shfl_sync(~0u, weight, i);
      const float* from = partial_o + int64_t{__shfl_sync(~0u, row, i)} * kHeadDim;
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
  }

 private:
  static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }
};

template <typename Element, int kHeadDim>
__device__ __forceinline__ void combine(const AttendParams& p, int item) {
  const int token = item / p.num_qo_heads, head = item % p.num_qo_heads, lane = threadIdx.x % 32;
  Combination<kHeadDim> result;
  for (int index = p.plan.merge_indptr[token]; index < p.plan.merge_indptr[token + 1]; ++index) {
    const TileRange tiles = tiles_of(p, index, head);
    for (int tile = tiles.begin; tile < tiles.end; tile += 32) {
      int row = 0;
      float lse = -INFINITY;
      if (tile + lane < tiles.end) {
        row = p.plan.tiles[tile + lane].partial + tiles.first_row;
        lse = p.partial_lse[row];
      }
      result.add(p.partial_o, row, lse, min(tiles.end - tile, 32));
    }
  }
  const float normalise = result.sum > 0.0f ? 1.0f / result.sum : 0.0f;
  auto* out = static_cast<Element*>(p.out) + int64_t{item} * kHeadDim;
#pragma unroll
  for (int v = 0; v < Combination<kHeadDim>::kVectors; ++v) {
    const int dim = Combination<kHeadDim>::dim(v);
    if (dim >= kHeadDim) continue;
    const float4 x = result.o[v];
    *reinterpret_cast<uint2*>(out + dim) = make_uint2(pack2<Element>(x.x * normalise, x.y * normalise),
                                                      pack2<Element>(x.z * normalise, x.w * normalise));
  }
  if (p.lse != nullptr && lane == 0) p.lse[item] = result.sum > 0.0f ? result.max + log2f(result.sum) : -INFINITY;
}

// ---------------------------------------------------------------------------------------------------------------- kernel

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps, 4) merge_kernel(const __grid_constant__ AttendParams p, int items_per_warp) {
  if (p.plan.counts[kNumPartials] == 0) return;
  const int lane = threadIdx.x % 32;
  const int begin = (blockIdx.x * kWarps + threadIdx.x / 32) * items_per_warp;
  const int end = min(begin + items_per_warp, p.num_tokens * p.num_qo_heads);
  const bool mine = begin + lane < end && has_partials(p, begin + lane);
  for (unsigned left = __ballot_sync(~0u, mine); left != 0; left &= left - 1) {
    combine<Element, kHeadDim>(p, begin + __ffs(left) - 1);
  }
}

// -------------------------------------------------------------------------------------------------------------- launcher

template <typename Element, int kHeadDim>
int launch(const AttendParams& p) {
  const int items = p.num_tokens * p.num_qo_heads;
  if (items == 0) return cudaSuccess;
  const int items_per_resident_warp = (items + p.num_sms * kWarpsPerSm - 1) / (p.num_sms * kWarpsPerSm);
  const int items_per_warp = items_per_resident_warp < 32 ? items_per_resident_warp : 32;
  const int ctas = (items + items_per_warp * kWarps - 1) / (items_per_warp * kWarps);
  merge_kernel<Element, kHeadDim>
      <<<ctas, 32 * kWarps, 0, static_cast<cudaStream_t>(p.stream)>>>(p, items_per_warp);
  return cudaGetLastError();
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
