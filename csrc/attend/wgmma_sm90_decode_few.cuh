// Decode on Hopper, tiles of few queries: nothing but what a small step waits for.
//
// A step of one to eight requests is over in 10 to 70 us, much of it start-up: code and plan come from memory, one load
// behind the other. So no warp of this kernel waits for another before the end of a tile. Each finds the CTA's tile and
// pages by itself and keeps a ring of its own filled by cp.async, 16 keys a piece. There are no tensor maps, no
// barriers and one way through the code, a third of what the other kernel runs through; and registers and shared memory
// are left for the merge's CTAs to get ready beside it.
//
// Tiles, cuts and arithmetic are those of the short tiles of the other kernel, and so is every bit. Where a few
// requests share pages and a tile has more than 16 packed queries, the warps wait for each other's keys, each for 16 of
// the queries.
//
// Grid   a CTA for each range of the plan, two to an SM. Block: 4 warps. Shared: a ring of pieces for each warp, 96 KB.
//
// Measured on an H200 with cold caches (32 query and 8 KV heads of 128, bf16, pages of 64), us, the other kernel / this
// one: 1 x 1K 15.9 / 10.1, 1 x 8K 22.5 / 16.3, 1 x 32K 44.7 / 39.3, 8 x 1K 23.4 / 18.3, 8 x 8K 75.1 / 70.8. Of that:
// - Four ways through a tile in one kernel instead of one: 2.3 us slower, wherever the one that runs stands: the merge,
//   launched early, waits for its code where both together are more than some 64 KB.
// - Queries asked for ahead of the first keys and used behind them, short products for addresses: 2 us faster.
// - All shared memory as the SM's carve-out, 33 pieces of a pair made 32: the merge takes 2 us instead of 6 (1 x 8K).
// - Two teams that load their keys each for itself, instead of waiting for each other's: 8 x 32K shared 84 / 69.
// - Nothing came of: a first piece of arithmetic, or a merge, rehearsed while nothing is there yet; prefetches of page
//   ids and queries to L2; evict-first; two pieces a ring instead of three.
// - Dense batches: SMs get 30 to 50 GB/s, by the size of their GPC, so CTAs end 6 to 10 % apart. Claimed ranges were to
//   give 2 to 5 % and gave -1 to +7 % of the time: each tile more costs its CTA 2 to 3 us (NOTES.md has the rest).
#pragma once

#include "attend/wgmma_sm90_decode_pieces.cuh"

namespace flashcore::decode90 {

constexpr int kFewThreads = kConsumers;

// Two CTAs of so many registers leave enough for one of the merge.
template <typename Traits, int kN>
__global__ void __maxnreg__(216) attend_few_kernel(const __grid_constant__ FewParams params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& rings = *reinterpret_cast<PieceRings<Traits>*>(storage);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Plan& plan = params.attend.plan;
  const TileRange range = first_range(plan);
  const int rows_packed = load_kept(plan.counts + kRowsPacked);
  TileWindow tiles(plan);
  tiles.load_guess(lane);
  allow_dependents();

  if (params.serves == Serves::not_sharing && rows_packed > 0) return wait_in_one_cta();
  if (params.serves == Serves::sharing && rows_packed == 0) return;  // of a branch, which is joined
  PieceLoader<Traits, TileWindow> loader(params, range, tiles, warp, lane);
  GlobalRows<Traits> sink{params.attend};
  loader.begin();
  int loaded = 0, slot = 0;
  for (int i = range.begin; i < range.end; ++i) {
    const Tile tile = tiles.tile(i);
    if (tile.kv_begin == tile.kv_end) {
      attend_none<Traits>(params, tile, sink, warp, lane);
      continue;
    }
    attend_few<Traits, kN, (kN > 1)>(rings, params, tile, loader, loaded, slot, sink, warp, lane);
  }
  wait_for_primary();  // even if it was not needed: whatever follows this kernel relies on select being over
}

}  // namespace flashcore::decode90
