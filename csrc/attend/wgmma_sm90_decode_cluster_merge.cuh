// Decode on Hopper, a cluster of CTAs a KV head: where partial results go, and how they become one.
//
// Where every token is in one row, a CTA pushes its partial results into the shared memory of the one that merges them,
// by st.async, whose bytes that one counts: no fence, no barrier of the cluster, and all at hand once they are there.
// Of packed rows a token has several: their results are kept, and fetched by who merges them behind a barrier.
#pragma once

#include "attend/wgmma_sm90_decode_cluster_rows.cuh"
#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_pieces.cuh"
#include "device/cluster.cuh"
#include "device/mbarrier.cuh"
#include "plan/scratch.h"

namespace flashcore::decode90 {

// Queries of the line whose results are kept in shared memory; those behind it go to the partial buffers. With up to 8
// packed queries that is all there can be.
constexpr int near_queries(int blocks) { return blocks == 1 ? 8 * (kMaxLevels + 1) : 32; }

// Row of the partial buffers for query `query` of the line, not a near one, in CTA `cta` of the grid.
__device__ __forceinline__ int far_row(int cta, int query, int num_queries, int near) {
  return cta * (num_queries - near) + query - near;
}

// The partial results that the CTAs of a cluster push to the one that merges them: item i in CTA i % 8.
template <typename Traits, int kItems_>
struct alignas(16) Pushed {
  static constexpr int kItems = kItems_;  // that a CTA merges at most

  float o[kItems][kClusterCtas][Traits::kHeadDim];
  float lse[kItems][kClusterCtas];
  Mbarrier arrived[kItems];  // the partial results of an item have

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kItems; ++i) mbarrier_init(&arrived[i], 1);
  }
  // Of row `row` of the CTA of number `rank`.
  __device__ __forceinline__ void push4(int rank, int row, int d, float4 x) {
    const int item = row / kClusterCtas, to = row % kClusterCtas;
    push(shared_address_in_cta(&o[item][rank][d], to), x, shared_address_in_cta(&arrived[item], to));
  }
  __device__ __forceinline__ void push_lse(int rank, int row, float x) {
    const int item = row / kClusterCtas, to = row % kClusterCtas;
    push(shared_address_in_cta(&lse[item][rank], to), x, shared_address_in_cta(&arrived[item], to));
  }
  // Until those in `in` have pushed their part of item `item`; all lanes of one warp.
  __device__ __forceinline__ void wait(int item, unsigned in, int lane) {
    constexpr int kBytes = sizeof(o[0][0]) + sizeof(lse[0][0]);
    if (lane == 0) mbarrier_arrive_expect_tx(&arrived[item], __popc(in) * kBytes);
    mbarrier_wait(&arrived[item], 0);
  }
};

// And those of its own rows whose tokens are in several rows.
template <typename Traits, int kN>
struct ClusterStorage {
  static constexpr int kNear = near_queries(kN);
  static constexpr bool kFar = kN > 1;

  PieceRings<Traits> rings;
  Pushed<Traits, kN == 1 ? 1 : kFewQueries / kClusterCtas> pushed;
  float kept[kNear][Traits::kHeadDim];
  float kept_lse[kNear];
};

// Where the rows of a CTA go: to the output; to the CTA that merges them, which then has all at hand; or, where a token
// is in several rows, to where it can be fetched, the first ones in shared memory, the others in the buffers.
template <typename Traits, int kN>
struct ClusterSink {
  using Storage = ClusterStorage<Traits, kN>;
  const AttendParams& p;
  Storage& shared;
  int rank;
  int num_queries;   // of the line
  bool met = false;  // all CTAs of the cluster are known to run

  __device__ __forceinline__ void meet() {
    if (!met) cluster_wait();
    met = true;
  }
  __device__ __forceinline__ void store4(bool direct, int row, int d, float4 o) const {
    if (direct) {
      decode90::store4<Traits>(p, true, row, d, o);
    } else if (row < kKept) {
      shared.pushed.push4(rank, row, d, o);
    } else if (!Storage::kFar || row - kKept < Storage::kNear) {
      *reinterpret_cast<float4*>(&shared.kept[row - kKept][d]) = o;
    } else {
      decode90::store4<Traits>(p, false, far_row(blockIdx.x, row - kKept, num_queries, Storage::kNear), d, o);
    }
  }
  __device__ __forceinline__ void store_lse(bool direct, int row, float lse) const {
    if (direct) {
      decode90::store_lse(p, true, row, lse);
    } else if (row < kKept) {
      shared.pushed.push_lse(rank, row, lse);
    } else if (!Storage::kFar || row - kKept < Storage::kNear) {
      shared.kept_lse[row - kKept] = lse;
    } else {
      decode90::store_lse(p, false, far_row(blockIdx.x, row - kKept, num_queries, Storage::kNear), lse);
    }
  }
};

// out = sum(w_n o_n) / sum(w_n), w_n = 2^(lse_n - max lse), over the CTAs of the cluster; one warp, four channels a
// lane.
struct MergeSum {
  float sum = 0.0f;
  float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  // The results of all CTAs; lane first_lane + rank holds the weight of CTA `rank`, 0 where it has none.
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
    const float inverse = inverse_or_zero(sum);
    if (4 * lane < Traits::kHeadDim) {
      store4<Traits>(p, true, row, 4 * lane, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
    }
    if (lane == 0) store_lse(p, true, row, maximum + log2_fast(sum));
  }
};

// A token that is in one row: its partial results have been pushed to this CTA by those in `in`.
template <typename Traits, int kItems>
__device__ __forceinline__ void merge_pushed(const Pushed<Traits, kItems>& pushed, int item, unsigned in,
                                             const AttendParams& p, int row, int lane) {
  float4 parts[kClusterCtas];
#pragma unroll
  for (int rank = 0; rank < kClusterCtas; ++rank) {
    parts[rank] = in >> rank & 1 ? *reinterpret_cast<const float4*>(&pushed.o[item][rank][lane * 4 % Traits::kHeadDim])
                                 : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  const float lse = in >> lane % kClusterCtas & 1 ? pushed.lse[item][lane % kClusterCtas] : -INFINITY;
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
  const auto far_in = [&](int rank, int query) {
    return far_row(kv_head * kClusterCtas + rank, query, rows.num_queries(), Storage::kNear);
  };
  const auto lse_of = [&](int level) {
    const int query = query_of(level), rank = lane % kClusterCtas;
    if (!rows.is_in(row_of(level), rank) || level >= item.rows) return -INFINITY;
    return is_near(query) ? *in_cta(&shared.kept_lse[query], rank) : p.partial_lse[far_in(rank, query)];
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
                                         : p.partial_o + int64_t{far_in(rank, query)} * Traits::kHeadDim;
      parts[rank] = in >> rank & 1 ? *reinterpret_cast<const float4*>(from + lane * 4 % Traits::kHeadDim)
                                   : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    sum.add(exp2_fast((level < kLevels ? lse : lse_behind) - reference), level % kLevels * kClusterCtas, parts);
  }
  sum.store<Traits>(p, out_row, maximum, lane);
}

}  // namespace flashcore::decode90
