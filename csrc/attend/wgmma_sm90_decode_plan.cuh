// Decode on Hopper: how warps read the plan. Their loads depend on one another, tile, then page ids, then keys, and
// where little is to be read these round trips would be most of the time.
#pragma once

#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/async_copy.cuh"
#include "device/dependent_launch.cuh"

namespace flashcore::decode90 {

// The tiles of this CTA; loaded before anything else, since all that follows hangs on it.
__device__ __forceinline__ TileRange first_range(const Plan& plan) {
  const int32_t* indptr = plan.cta_indptr + blockIdx.x;
  return {load_kept(indptr), load_kept(indptr + 1)};
}

// The same, and what else a CTA of the larger kernel needs first.
struct FirstRange {
  TileRange tiles;
  int pages_read, rows_packed, num_tiles;

  __device__ __forceinline__ explicit FirstRange(const Plan& plan)
      : tiles(first_range(plan)),
        pages_read(load_kept(plan.counts + kPagesRead)),
        rows_packed(load_kept(plan.counts + kRowsPacked)),
        num_tiles(load_kept(plan.counts + kNumTiles)) {}
};

// How many SMs one kernel leaves to that of packed rows.
__device__ __forceinline__ int left_sms(const AttendParams& p) {
  return load_kept(p.plan.counts + kPackedShare) * p.num_sms / kWholeShare;
}

// Page columns [0, columns) of the tiles of a CTA, 32 at a time: lane l holds column first + l of the current window.
struct PageWindow {
  const int32_t* pages;
  int first, columns;

  __device__ __forceinline__ int32_t load(int lane) const {
    const int column = first + lane;
    return column < columns ? load_kept_coherent(pages + column) : 0;  // select may have written them meanwhile
  }

  // The first columns of keys [kv_begin, kv_end) of a row whose pages stand from `begin` on. Of a list that select
  // writes, from lists_begin on (0: none is), only once select is over.
  static __device__ __forceinline__ PageWindow of(const Plan& plan, int begin, int kv_begin, int kv_end, int page_shift,
                                                  int lists_begin) {
    if (lists_begin > 0 && begin >= lists_begin) wait_for_primary();
    return {plan.kv_indices + begin, kv_begin >> page_shift, (kv_end + (1 << page_shift) - 1) >> page_shift};
  }
};

// The plan's tiles [base, base + 32), one a lane: one round trip fetches what a CTA mostly needs. A kernel's first
// window is a guess, fetched at once with the CTA's first range: it holds where there are about as many tiles as CTAs,
// which is where a round trip counts.
struct TileWindow {
  const Plan& plan;
  int base = 0;
  Tile lanes_tile{};

  __device__ __forceinline__ explicit TileWindow(const Plan& plan) : plan(plan) {}

  __device__ __forceinline__ void load(int first, int lane) {
    base = first;
    lanes_tile = first + lane < plan.max_tiles ? load_kept(plan.tiles + first + lane) : Tile{};
  }
  // About tile blockIdx.x: there are cuts in front of it, which make more tiles, and CTAs without one.
  __device__ __forceinline__ void load_guess(int lane) { load(blockIdx.x - blockIdx.x / 16, lane); }
  // Tile i of the plan, from the window if it is there; all lanes together.
  __device__ __forceinline__ Tile tile(int i) const {
    if (!holds(i)) return plan.tiles[i];
    const auto of = [&](int field) { return __shfl_sync(~0u, field, i - base); };
    const Tile& mine = lanes_tile;
    return {.pair = of(mine.pair),
            .kv_begin = of(mine.kv_begin),
            .kv_end = of(mine.kv_end),
            .partial = of(mine.partial),
            .page_begin = of(mine.page_begin),
            .q_begin = of(mine.q_begin),
            .q_count = of(mine.q_count),
            .kv_pos = of(mine.kv_pos)};
  }
  __device__ __forceinline__ bool holds(int i) const { return i >= base && i < base + 32; }
  __device__ __forceinline__ int pair(int i) const { return __shfl_sync(~0u, lanes_tile.pair, i - base); }
  __device__ __forceinline__ int kv_begin(int i) const { return __shfl_sync(~0u, lanes_tile.kv_begin, i - base); }
  __device__ __forceinline__ int kv_end(int i) const { return __shfl_sync(~0u, lanes_tile.kv_end, i - base); }
  __device__ __forceinline__ int page_begin(int i) const { return __shfl_sync(~0u, lanes_tile.page_begin, i - base); }

  // The first page columns of tile i, which is here.
  __device__ __forceinline__ PageWindow pages(int i, int page_shift, int lists_begin) const {
    return PageWindow::of(plan, page_begin(i), kv_begin(i), kv_end(i), page_shift, lists_begin);
  }
};

// Query token i of a tile.
__device__ __forceinline__ int token_of(const AttendParams& p, const Tile& tile, int i) {
  return tile.q_begin < 0 ? p.plan.row_tokens[~tile.q_begin + i] : tile.q_begin + i;
}

// Packed query m of a tile whose first query head is first_head: query head head_in_group of the tile's token i_token.
struct PackedQuery {
  int token;
  int64_t offset;   // into q
  int32_t out_row;  // of out and lse, or of the partials

  __device__ __forceinline__ PackedQuery(const AttendParams& p, const Tile& tile, int first_head, int i_token,
                                         int head_in_group, int m) {
    token = token_of(p, tile, i_token);
    const int head = first_head + head_in_group;
    offset = token * p.q_stride_token + head * p.q_stride_head;
    out_row = tile.partial < 0 ? token * p.num_qo_heads + head : tile.partial + m;
  }
};

// Brings the beginnings of tables to L2, each CTA a few lines of each. Lane l takes table l / 4.
class Prefetch {
 public:
  __device__ __forceinline__ explicit Prefetch(int lane) : lane_(lane) {}

  __device__ __forceinline__ void table(int i, const void* begin, int64_t bytes) const {
    const int64_t offset = int64_t{kLine} * (blockIdx.x + gridDim.x * (lane_ % kLinesPerCta));
    if (lane_ / kLinesPerCta == i && offset < bytes) prefetch_l2(static_cast<const uint8_t*>(begin) + offset);
  }

 private:
  static constexpr int kLine = 128, kLinesPerCta = 4;
  const int lane_;
};

// What the producers read first.
__device__ __forceinline__ void prefetch_metadata(const AttendParams& p, int lane) {
  const Prefetch prefetch(lane);
  prefetch.table(0, p.plan.tiles, p.plan.max_tiles * sizeof(Tile));
  prefetch.table(1, p.plan.kv_indices, p.plan.max_pages * sizeof(int32_t));
  prefetch.table(2, p.plan.row_tokens, p.plan.max_row_tokens * sizeof(int32_t));
  prefetch.table(3, p.plan.positions, p.num_tokens * sizeof(int32_t));
  prefetch.table(4, p.q, p.num_tokens * p.q_stride_token * sizeof(uint16_t));
}

// What the merge will read: where its CTAs find no room beside these, they begin when time counts.
__device__ __forceinline__ void prefetch_merge(const AttendParams& p, int lane) {
  const Prefetch prefetch(lane);
  prefetch.table(0, p.plan.merge_indptr, (p.num_tokens + 1) * sizeof(int32_t));
  prefetch.table(1, p.plan.merge_rows, p.plan.max_merge * 2 * sizeof(int32_t));
  prefetch.table(2, p.plan.pair_tiles, p.plan.max_rows * p.num_kv_heads * 2 * sizeof(int32_t));
  prefetch.table(3, p.plan.tiles, p.plan.max_tiles * sizeof(Tile));
}

}  // namespace flashcore::decode90
