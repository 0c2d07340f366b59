// Decode on Hopper, small steps: a cluster of CTAs for each KV head, from the keys to the merged output.
#pragma once

#include "attend/wgmma_sm90_decode_cluster_rows.cuh"
#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_pieces.cuh"
#include "device/cluster.cuh"
#include "plan/scratch.h"

namespace flashcore::decode90 {

constexpr int kClusterThreads = kClusterWarps * 32;
constexpr int kNearQueries = 64;  // queries whose partial results stand in shared memory

template <typename Traits>
struct ClusterStorage {
  PieceRings<Traits> rings;
  float o[kNearQueries][Traits::kHeadDim];
  float lse[kNearQueries];
};

// Where the rows of a CTA go. Partial results: the first queries' to its shared memory, the others' to the buffers.
template <typename Traits, bool kFar>
struct ClusterSink {
  const AttendParams& p;
  ClusterStorage<Traits>& shared;
  int far;  // rows of the buffers in front of this CTA's

  __device__ __forceinline__ void store4(bool direct, int row, int d, float4 o) const {
    if (!direct && (!kFar || row < kNearQueries)) {
      *reinterpret_cast<float4*>(&shared.o[row][d]) = o;
    } else {
      decode90::store4<Traits>(p, direct, direct ? row : far + row, d, o);
    }
  }
  __device__ __forceinline__ void store_lse(bool direct, int row, float lse) const {
    if (!direct && (!kFar || row < kNearQueries)) {
      shared.lse[row] = lse;
    } else {
      decode90::store_lse(p, direct, direct ? row : far + row, lse);
    }
  }
};

// out = sum(w_n o_n) / sum(w_n), w_n = 2^(lse_n - max lse), over the CTAs that the token's rows are in; one warp.
template <typename Traits, bool kFar>
__device__ __forceinline__ void merge_cluster(const ClusterStorage<Traits>& shared, const FewParams& params,
                                              const HeadRows& rows, const MergeItem& item, int kv_head, int lane) {
  constexpr int kLevels = 32 / kClusterCtas;  // rows that a pass looks at: lane l at row l / 8 in CTA l % 8
  static_assert(kMaxLevels + 1 <= 2 * kLevels);
  const AttendParams& p = params.attend;
  if (item.rows == 0) return;

  const auto query_of = [&](int level) {
    const int row = __shfl_sync(~0u, item.entry.x, level), index = __shfl_sync(~0u, item.entry.y, level);
    return rows.first_query(row) + index * params.group + item.head_in_group;
  };
  const auto near_to = [&](int query) { return !kFar || query < kNearQueries; };
  const auto far_row = [&](int rank, int query) { return (kv_head * kClusterCtas + rank) * rows.num_queries() + query; };
  const auto lse_of = [&](int level) {
    const int query = query_of(level), rank = lane % kClusterCtas;
    if (!rows.is_in(__shfl_sync(~0u, item.entry.x, level), rank) || level >= item.rows) return -INFINITY;
    return near_to(query) ? *in_cta(&shared.lse[query], rank) : p.partial_lse[far_row(rank, query)];
  };

  // A partial result that is there has an LSE above -inf, but where its keys are all masked; then it counts for nothing.
  const float lse = lse_of(lane / kClusterCtas);
  const float lse_behind = item.rows > kLevels ? lse_of(kLevels + lane / kClusterCtas) : -INFINITY;
  const int first_row = __shfl_sync(~0u, item.entry.x, 0);
  const unsigned in_first = __ballot_sync(~0u, rows.is_in(first_row, lane % kClusterCtas));
  if (item.rows == 1 && __popc(in_first) == 32 / kClusterCtas && rows.is_sole(first_row)) return;  // it stands in out

  constexpr int kLanes = Traits::kHeadDim / 4;  // that hold channels, four each
  const int d = lane % kLanes * 4;
  float maximum = 0.0f, reference = 0.0f, sum = 0.0f;
  float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int level = 0; level < item.rows; ++level) {
    const int query = query_of(level), row = __shfl_sync(~0u, item.entry.x, level);
    const unsigned in = __ballot_sync(~0u, rows.is_in(row, lane % kClusterCtas));
    float4 o[kClusterCtas];
#pragma unroll
    for (int rank = 0; rank < kClusterCtas; ++rank) {
      const float* from = near_to(query) ? in_cta(&shared.o[query][0], rank)
                                         : p.partial_o + int64_t{far_row(rank, query)} * Traits::kHeadDim;
      o[rank] = in >> rank & 1 ? *reinterpret_cast<const float4*>(from + d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    if (level == 0) {  // behind the first loads, which take as long as those of the LSEs
      maximum = fmaxf(lse, lse_behind);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
      reference = maximum == -INFINITY ? 0.0f : maximum;
    }
    const float weights = exp2_fast((level < kLevels ? lse : lse_behind) - reference);
#pragma unroll
    for (int rank = 0; rank < kClusterCtas; ++rank) {
      const float weight = __shfl_sync(~0u, weights, level % kLevels * kClusterCtas + rank);
      sum += weight;
      all.x += weight * o[rank].x;
      all.y += weight * o[rank].y;
      all.z += weight * o[rank].z;
      all.w += weight * o[rank].w;
    }
  }
  const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
  const int row = item.token * p.num_qo_heads + kv_head * params.group + item.head_in_group;
  if (lane < kLanes) {
    store4<Traits>(p, true, row, d, make_float4(all.x * inverse, all.y * inverse, all.z * inverse, all.w * inverse));
  }
  if (lane == 0) store_lse(p, true, row, maximum + log2f(sum));
}

template <typename Traits, int kN>
__global__ void __launch_bounds__(kClusterThreads, 1) attend_cluster_kernel(const __grid_constant__ FewParams params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<ClusterStorage<Traits>*>(storage);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = blockIdx.x / kClusterCtas, rank = blockIdx.x % kClusterCtas;

  MergeItem item(params, rank + kClusterCtas * warp);
  HeadRows rows(params, kv_head, rank, lane);
  item.load_entries(params.attend.plan, lane);
  const TileRange range = rows.range();
  PieceLoader<Traits, HeadRows> loader(params, range, rows, warp, lane);
  const ClusterSink<Traits, (kN > 1)> sink{params.attend, shared, (kv_head * kClusterCtas + rank) * rows.num_queries()};
  loader.begin();
  int loaded = 0, slot = 0;
  for (int i = range.begin; i < range.end; ++i) {
    const Tile tile = rows.tile(i);
    if (tile.kv_begin == tile.kv_end) {
      const int queries = tile.q_count * params.group;
      const PackedQuery query = packed_query(params, tile, min(lane, queries - 1));
      for (int m = warp; m < queries; m += kClusterWarps) {
        store_empty<Traits>(sink, tile.partial < 0, __shfl_sync(~0u, query.out_row, m), lane);
      }
      continue;
    }
    attend_few<Traits, kN>(shared.rings, params, tile, loader, loaded, slot, sink, warp, lane);
  }

  cluster_arrive();
  cluster_wait();
  merge_cluster<Traits, (kN > 1)>(shared, params, rows, item, kv_head, lane);
  cluster_arrive();
  cluster_wait();  // shared memory must not go while others read it
  wait_for_primary();  // even if it was not needed: whatever follows this kernel relies on select being over
}

}  // namespace flashcore::decode90
