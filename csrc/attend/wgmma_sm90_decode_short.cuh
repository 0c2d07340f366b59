// Decode on Hopper, short tiles (up to 16 packed queries, one request's group) out of the ring of stages: each of the
// four consumer warps takes 16 keys of every unit of 64.
#pragma once

#include "attend/wgmma_sm90_decode_short_tile.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/async_copy.cuh"
#include "device/wgmma.cuh"

namespace flashcore::decode90 {

// One tile of at most 8 * kN packed queries and at least one key.
template <typename Traits, int kN>
__device__ __forceinline__ void consume_short(SharedStorage<Traits>& shared, const Params& params,
                                              StageRing<Traits>& ring, int warp, int lane) {
  const int pair = lane % 4;

  // Queries, and what this lane needs of the tile; then the query buffer is free for the next tile.
  ShortTile<Traits, kN> tile;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int step = 0; step < tile.kSteps; step += 2) {
      uint32_t b[4];
      load_matrix_x4(b, shared_address(shared.q[0] + swizzled(8 * n + lane % 8, 2 * step + lane / 8)));
      tile.q[n][step][0] = b[0];
      tile.q[n][step][1] = b[1];
      tile.q[n][step + 1][0] = b[2];
      tile.q[n][step + 1][1] = b[3];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      tile.visible_begin[n][e] = shared.tile.visible_begin[8 * n + 2 * pair + e];
      tile.visible_end[n][e] = shared.tile.visible_end[8 * n + 2 * pair + e];
    }
  }
  const int32_t out_row = shared.tile.out_row[lane];
  const int queries = shared.tile.queries;
  const bool direct = shared.tile.direct;
  const int kv_begin = shared.tile.kv_begin, kv_end = shared.tile.kv_end;
  const int free_begin = shared.tile.free_begin, free_end = shared.tile.free_end;
  mbarrier_arrive(&shared.q_empty);

  tile.clear();
  const uint32_t k_row = swizzled(kWarpKeys * warp + lane % 16, 0) & ~127u;
  const uint32_t v_row = swizzled(kWarpKeys * warp + lane % 8 + lane / 16 * 8, 0) & ~127u;
  for (int key = kv_begin; key < kv_end; key += kUnitKeys) {
    Stage<Traits>& stage = shared.stages[ring.stage];
    mbarrier_wait(&shared.full[ring.stage], ring.parity);
    if (key + kUnitKeys > kv_end) zero_values(stage, kv_end - key, kWarpKeys * warp, kWarpKeys * (warp + 1), lane);
    tile.template add_keys<kSlabBytes>(params, shared_address(stage.k) + k_row, shared_address(stage.v) + v_row,
                                       key + kWarpKeys * warp, key < free_begin || key + kUnitKeys > free_end, lane);
    if (key + kUnitKeys < kv_end) {
      release(&shared.empty[ring.stage], lane);
      ring.advance();
    }
  }

  tile.add_lanes();
  // Once every warp is through with the last unit, its stage holds their shares.
  Share<Traits::kHeadDim>* shares = shared.stages[ring.stage].shares;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    named_barrier_sync(kConsumerBarrier, kConsumers);
    tile.leave(shares[warp], n, lane);
    named_barrier_sync(kConsumerBarrier, kConsumers);
    combine_shares<Traits, kConsumerWarps>([&](int w) -> const auto& { return shares[w]; }, params,
                                           min(8, queries - 8 * n), direct, __shfl_sync(~0u, out_row, 8 * n + lane % 8),
                                           GlobalRows<Traits>{params.attend}, warp, kConsumerWarps, lane);
  }
  named_barrier_sync(kConsumerBarrier, kConsumers);
  fence_proxy_async();
  release(&shared.empty[ring.stage], lane);
  ring.advance();
}

}  // namespace flashcore::decode90
