// Decode on Hopper, small steps: a cluster of CTAs for each KV head, from the keys to the merged output.
#pragma once

#include "attend/wgmma_sm90_decode_cluster_rows.cuh"
#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_pieces.cuh"
#include "device/cluster.cuh"
#include "plan/scratch.h"

namespace flashcore::decode90 {

constexpr int kClusterThreads = kClusterWarps * 32;

// The partial results that a CTA merges, and its own of rows whose tokens are in several rows.
template <typename Traits, int kN>
struct ClusterStorage {
  static constexpr int kItems = kN == 1 ? 1 : kFewQueries / kClusterCtas;  // that a CTA merges at most
  static constexpr int kNear = kN == 1 ? 8 * (kMaxLevels + 1) : 32;        // of kN = 1 these are all
  static constexpr bool kFar = kN > 1;

  PieceRings<Traits> rings;
  float pushed[kItems][kClusterCtas][Traits::kHeadDim];
  float kept[kNear][Traits::kHeadDim];
  float pushed_lse[kItems][kClusterCtas];
  float kept_lse[kNear];
  Mbarrier arrived[kItems];  // the partial results of an item have
};

// Where the rows of a CTA go: to the output; to the CTA that merges them, which then has all at hand; or, where a token
// is in several rows, to where it can be fetched, the first ones in shared memory, the others in the buffers.
template <typename Traits, int kN>
struct ClusterSink {
  using Storage = ClusterStorage<Traits, kN>;
  const AttendParams& p;
  Storage& shared;
  int rank;
  int far;        // rows of the buffers in front of this CTA's
  bool met = false;  // all CTAs of the cluster are known to run

  __device__ __forceinline__ void meet() {
    if (!met) cluster_wait();
    met = true;
  }
  __device__ __forceinline__ void store4(bool direct, int row, int d, float4 o) const {
    if (direct) {
      decode90::store4<Traits>(p, true, row, d, o);
    } else if (row < kKept) {
      const int item = row / kClusterCtas, to = row % kClusterCtas;
      push(shared_address_in_cta(&shared.pushed[item][rank][d], to), o,
           shared_address_in_cta(&shared.arrived[item], to));
    } else if (!Storage::kFar || row - kKept < Storage::kNear) {
      *reinterpret_cast<float4*>(&shared.kept[row - kKept][d]) = o;
    } else {
      decode90::store4<Traits>(p, false, far + row - kKept, d, o);
    }
  }
  __device__ __forceinline__ void store_lse(bool direct, int row, float lse) const {
    if (direct) {
      decode90::store_lse(p, true, row, lse);
    } else if (row < kKept) {
      const int item = row / kClusterCtas, to = row % kClusterCtas;
      push(shared_address_in_cta(&shared.pushed_lse[item][rank], to), lse,
           shared_address_in_cta(&shared.arrived[item], to));
    } else if (!Storage::kFar || row - kKept < Storage::kNear) {
      shared.kept_lse[row - kKept] = lse;
    } else {
      decode90::store_lse(p, false, far + row - kKept, lse);
    }
  }
};

// out = sum(w_n o_n) / sum(w_n), w_n = 2^(lse_n - max lse), over the CTAs of the cluster; one warp. Lane l < 8 and those
// with the same l % 8 hold the LSE of CTA l % 8, -inf where it has none.
struct MergeSum {
  float sum = 0.0f;
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  __device__ __forceinline__ void add(float weights, int first_lane, const float4 (&parts)[kClusterCtas]) {
#pragma unroll
    for (int rank = 0; rank < kClusterCtas; ++rank) {
      const float weight = __shfl_sync(~0u, weights, first_lane + rank);
      sum += weight;
      o.x += weight * parts[rank].x;
      o.y += weight * parts[rank].y;
      o.z += weight * parts[rank].z;
      o.w += weight * parts[rank].w;
    }
  }
  template <typename Traits>
  __device__ __forceinline__ void store(const AttendParams& p, int row, float maximum, int lane) const {
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (4 * lane < Traits::kHeadDim) {
      store4<Traits>(p, true, row, 4 * lane, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
    }
    if (lane == 0) store_lse(p, true, row, maximum + log2f(sum));
  }
};

// A token that is in one row: its partial results have been pushed to this CTA by those in `in`.
template <typename Traits>
__device__ __forceinline__ void merge_pushed(const float (&pushed)[kClusterCtas][Traits::kHeadDim],
                                             const float (&lses)[kClusterCtas], unsigned in, const AttendParams& p,
                                             int row, int lane) {
  float4 parts[kClusterCtas];
#pragma unroll
  for (int rank = 0; rank < kClusterCtas; ++rank) {
    parts[rank] = in >> rank & 1 ? *reinterpret_cast<const float4*>(&pushed[rank][lane * 4 % Traits::kHeadDim])
                                 : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  const float lse = in >> lane % kClusterCtas & 1 ? lses[lane % kClusterCtas] : -INFINITY;
  float maximum = lse;
#pragma unroll
  for (int step = kClusterCtas / 2; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
  MergeSum sum;
  sum.add(exp2_fast(lse - (maximum == -INFINITY ? 0.0f : maximum)), 0, parts);
  sum.store<Traits>(p, row, maximum, lane);
}

// A token that is in several rows: its partial results are fetched from where they have been kept.
template <typename Traits, int kN>
__device__ __forceinline__ void merge_kept(const ClusterStorage<Traits, kN>& shared, const FewParams& params,
                                           const HeadRows& rows, const MergeItem& item, int kv_head, int out_row,
                                           int lane) {
  using Storage = ClusterStorage<Traits, kN>;
  constexpr int kLevels = 32 / kClusterCtas;  // rows whose LSEs a register holds: lane l row l / 8 in CTA l % 8
  static_assert(kMaxLevels + 1 <= 2 * kLevels);
  const AttendParams& p = params.attend;
  const auto row_of = [&](int level) { return __shfl_sync(~0u, item.entry.x, level); };
  const auto query_of = [&](int level) {
    return rows.first_query(row_of(level)) + __shfl_sync(~0u, item.entry.y, level) * params.group + item.head_in_group;
  };
  const auto is_near = [](int query) { return !Storage::kFar || query < Storage::kNear; };
  const auto far_row = [&](int rank, int query) { return (kv_head * kClusterCtas + rank) * rows.num_queries() + query; };
  const auto lse_of = [&](int level) {
    const int query = query_of(level), rank = lane % kClusterCtas;
    if (!rows.is_in(row_of(level), rank) || level >= item.rows) return -INFINITY;
    return is_near(query) ? *in_cta(&shared.kept_lse[query], rank) : p.partial_lse[far_row(rank, query)];
  };
  const float lse = lse_of(lane / kClusterCtas);
  const float lse_behind = item.rows > kLevels ? lse_of(kLevels + lane / kClusterCtas) : -INFINITY;
  float maximum = fmaxf(lse, lse_behind);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
  const float reference = maximum == -INFINITY ? 0.0f : maximum;
  MergeSum sum;
#pragma unroll 1
  for (int level = 0; level < item.rows; ++level) {
    const int query = query_of(level);
    const unsigned in = __ballot_sync(~0u, rows.is_in(row_of(level), lane % kClusterCtas));
    float4 parts[kClusterCtas];
#pragma unroll
    for (int rank = 0; rank < kClusterCtas; ++rank) {
      const float* from = is_near(query) ? in_cta(&shared.kept[query][0], rank)
                                         : p.partial_o + int64_t{far_row(rank, query)} * Traits::kHeadDim;
      parts[rank] = in >> rank & 1 ? *reinterpret_cast<const float4*>(from + lane * 4 % Traits::kHeadDim)
                                   : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    sum.add(exp2_fast((level < kLevels ? lse : lse_behind) - reference), level % kLevels * kClusterCtas, parts);
  }
  sum.store<Traits>(p, out_row, maximum, lane);
}

template <typename Traits, int kN>
__global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kClusterThreads, 1)
    attend_cluster_kernel(const __grid_constant__ FewParams params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<ClusterStorage<Traits, kN>*>(storage);
  const AttendParams& p = params.attend;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = blockIdx.x / kClusterCtas, rank = blockIdx.x % kClusterCtas;

  using Storage = ClusterStorage<Traits, kN>;
  MergeItem item(params, rank + kClusterCtas * warp);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Storage::kItems; ++i) mbarrier_init(&shared.arrived[i], 1);
    mbarrier_init_fence();
  }
  cluster_arrive_relaxed();
  const bool keeps = p.plan.counts[kRowsPacked] > 0;  // tokens are in several rows
  HeadRows rows(params, kv_head, rank, lane);
  item.load_entries(p.plan, lane);
  const TileRange range = rows.range();
  PieceLoader<Traits, HeadRows> loader(params, range, rows, warp, lane);
  ClusterSink<Traits, kN> sink{p, shared, rank, (kv_head * kClusterCtas + rank) * rows.num_queries()};
  loader.begin();
  int loaded = 0, slot = 0;
  for (int i = range.begin; i < range.end; ++i) {
    const Tile tile = rows.tile(i, params.group);
    if (tile.kv_begin == tile.kv_end) {
      const int queries = tile.q_count * params.group;
      const PackedQuery query = packed_query(params, tile, min(lane, queries - 1));
      sink.meet();
      for (int m = warp; m < queries; m += kClusterWarps) {
        store_empty<Traits>(sink, tile.partial < 0, __shfl_sync(~0u, query.out_row, m), lane);
      }
      continue;
    }
    if (kN == 1 || tile.q_count * params.group <= 8) {
      attend_few<Traits, 1>(shared.rings, params, tile, loader, loaded, slot, sink, warp, lane);
    } else {
      attend_few<Traits, kN>(shared.rings, params, tile, loader, loaded, slot, sink, warp, lane);
    }
  }
  sink.meet();

  const int first_row = __shfl_sync(~0u, item.entry.x, 0);
  const unsigned in = __ballot_sync(~0u, rows.is_in(first_row, lane % kClusterCtas)) & ((1u << kClusterCtas) - 1);
  const int out_row = item.token * p.num_qo_heads + kv_head * params.group + item.head_in_group;
  if (item.rows == 1 && rows.is_sole(first_row) && __popc(in) > 1) {
    constexpr int kBytes = sizeof(shared.pushed[0][0]) + sizeof(shared.pushed_lse[0][0]);
    if (lane == 0) mbarrier_arrive_expect_tx(&shared.arrived[warp], __popc(in) * kBytes);
    mbarrier_wait(&shared.arrived[warp], 0);
    merge_pushed<Traits>(shared.pushed[warp], shared.pushed_lse[warp], in, p, out_row, lane);
  }
  if (keeps) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (item.rows > 0 && !rows.is_sole(first_row)) {
      merge_kept<Traits, kN>(shared, params, rows, item, kv_head, out_row, lane);
    }
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();  // shared memory must not go while others read it
  }
  wait_for_primary();  // even if it was not needed: whatever follows this kernel relies on select being over
}

}  // namespace flashcore::decode90
