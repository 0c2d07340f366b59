// Decode on Hopper, small steps of models with 8 KV heads: a cluster of CTAs for each of them, from the keys to the
// output.
//
// All that a KV head's queries need is read by one cluster, so its CTAs merge among themselves: there is no second
// kernel, which costs 2 us and more. The rows of a plan are the same for every KV head, so each cluster cuts the same
// line (HeadRows), evenly whatever the lengths are; tiles and CTA ranges of the plan are not used, and packed rows,
// page lists and masks are as anywhere. 64 of 132 SMs are enough: with 192 KB on its way to each they read 4.3 TB/s.
//
// Grid   8 CTAs a KV head, one to an SM. Block: 8 warps, a ring of pieces each (wgmma_sm90_decode_pieces.cuh).
// Shared rings 192 KB; partial results, pushed and kept, up to 33 KB.
//
// Measured on an H200 with cold caches (32 query and 8 KV heads of 128, bf16, pages of 64), us, with the merge,
// wgmma_sm90_decode_few.cuh / this one: 1 x 1K 9.5 / 8.0, 1 x 8K 15.7 / 14.4, 1 x 32K 37.9 / 36.5, 4 x 1K 13.4 / 11.3,
// 4 x 8K 39.9 / 36.8. Of that:
// - What each layer reads of the plan stays in L2: 0.3 us.
// - Partial results pushed, with one barrier of the cluster, instead of fetched between two: 0.5 us.
// - st.async and its count instead of that barrier; no fence in the arrival that says that a CTA runs: 0.7 us. A
//   release at cluster scope is a MEMBAR at that of the GPU.
// - Queries asked for ahead of the keys: 0.4 us to 1.1 us; the other kernel, 0 to 0.4 us.
// - Sums over as many rows as there can be, not over 32: 0.3 us where there is one.
// - With the other kernel, which leaves on a branch beside it (run_cluster_or_few), 8 x 1K takes 13.1 us instead of
//   13.0; where that one leaves behind it 13.5 to 13.8; that one alone 14.8.
// - Two ways through a tile, for up to 8 and up to 16 queries: 1.1 us at 4 x 1K.
// - Not enough SMs: packed rows of 17 to 32 queries, which the arithmetic bounds (8 x 32K, 30K of it shared: 86 us as
//   two rows of 16, the other kernel 59); 9 to 16 requests with a common start that is not packed, which L2 gives to
//   twice as many SMs in half the time (16 x 2.3K, 2K of it shared: 39 us, 26). Clusters of 16 do not fit 8 times,
//   clusters of 8 not 16 times: an H200 has GPCs of fewer SMs.
#pragma once

#include "attend/wgmma_sm90_decode_cluster_merge.cuh"
#include "attend/wgmma_sm90_decode_cluster_rows.cuh"
#include "attend/wgmma_sm90_decode_pieces.cuh"
#include "device/cluster.cuh"
#include "device/mbarrier.cuh"

namespace flashcore::decode90 {

constexpr int kClusterThreads = kClusterWarps * 32;

template <typename Traits, int kN>
__global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kClusterThreads, 1)
    attend_cluster_kernel(const __grid_constant__ FewParams params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<ClusterStorage<Traits, kN>*>(storage);
  const AttendParams& p = params.attend;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = blockIdx.x / kClusterCtas, rank = blockIdx.x % kClusterCtas;

  MergeItem item(params, rank + kClusterCtas * warp);
  if (threadIdx.x == 0) {
    shared.pushed.init();
    mbarrier_init_fence();
  }
  cluster_arrive_relaxed();
  const bool keeps = load_kept(p.plan.counts + kRowsPacked) > 0;  // tokens are in several rows
  HeadRows rows(params, kv_head, rank, lane);
  item.load_entries(p.plan, lane);
  if (params.serves == Serves::not_sharing && keeps) return;
  const TileRange range = rows.range();
  PieceLoader<Traits, HeadRows> loader(params, range, rows, warp, lane);
  ClusterSink<Traits, kN> sink{p, shared, rank, rows.num_queries()};
  loader.begin();
  if (params.serves == Serves::not_sharing) allow_dependents();  // there is room for them to leave
  int loaded = 0, slot = 0;
  for (int i = range.begin; i < range.end; ++i) {
    const Tile tile = rows.tile(i, params.group);
    if (tile.kv_begin == tile.kv_end) {
      attend_none<Traits>(params, tile, sink, warp, lane);
      continue;
    }
    if (kN == 1 || tile.q_count * params.group <= 8) {
      attend_few<Traits, 1, false>(shared.rings, params, tile, loader, loaded, slot, sink, warp, lane);
    } else {
      attend_few<Traits, kN, false>(shared.rings, params, tile, loader, loaded, slot, sink, warp, lane);
    }
  }
  sink.meet();

  const int first_row = __shfl_sync(~0u, item.entry.x, 0);
  const unsigned in = __ballot_sync(~0u, rows.is_in(first_row, lane % kClusterCtas)) & ((1u << kClusterCtas) - 1);
  const int out_row = item.token * p.num_qo_heads + kv_head * params.group + item.head_in_group;
  if (item.rows == 1 && rows.is_sole(first_row) && __popc(in) > 1) {
    shared.pushed.wait(warp, in, lane);
    merge_pushed(shared.pushed, warp, in, p, out_row, lane);
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
