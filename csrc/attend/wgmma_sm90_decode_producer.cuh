// Decode on Hopper, the producers: one warp keeps the ring of KV stages full, another fetches each tile's queries.
// Both run ahead of the consumers across tiles, so that the next tile's bytes are in flight while this one ends.
#pragma once

#include "attend/wgmma_sm90_decode_dealer.cuh"
#include "attend/wgmma_sm90_decode_plan.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/async_copy.cuh"
#include "device/dependent_launch.cuh"

namespace flashcore::decode90 {

// Loads the keys and values of a range of tiles, unit by unit. Lane i issues box i of a unit.
template <typename Traits>
__device__ __forceinline__ void load_tiles(SharedStorage<Traits>& shared, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Params& params, TileRange range,
                                           TileWindow& tiles, StageRing<Traits>& ring, uint64_t l2_policy, int lane) {
  const int page_shift = params.page_shift;
  const int page_size = 1 << page_shift;
  const int unit_pages = max(1, kUnitKeys >> page_shift);
  const int slab_boxes = Traits::kSlabs / params.box_slabs;
  const uint32_t box_bytes = params.box_tokens * params.box_slabs * 128;

  // This lane's box of every unit: K or V, which page of the unit, which slab of head_dim.
  const bool is_v = lane % 2 != 0;
  const int box_slab = lane / 2 % slab_boxes;
  const int box_page = lane / 2 / slab_boxes;
  const bool has_box = box_page < unit_pages;
  const CUtensorMap* map = is_v ? &v_map : &k_map;
  const int box_offset = (is_v ? Traits::kOperandBytes : 0) + box_slab * kSlabBytes + box_page * page_size * 128;

  const auto first_pages = [&](int i) { return tiles.pages(i, page_shift, params.attend.lists_begin); };
  PageWindow window{};
  int32_t next_ids = 0;
  bool fetched = false;  // whether next_ids are the first ones of the tile to come
  for (int i = range.begin; i < range.end; ++i) {
    if (!tiles.holds(i)) tiles.load(i, lane);
    if (!fetched) {
      window = first_pages(i);
      next_ids = window.load(lane);
    }
    const int kv_end = tiles.kv_end(i);
    const int head = tiles.pair(i) % params.by_head;
    int key = tiles.kv_begin(i);
    fetched = key < kv_end && i + 1 < range.end && tiles.holds(i + 1);
    while (key < kv_end) {
      // Take the ids fetched before and fetch those after them: this tile's or the next tile's.
      const int32_t ids = next_ids;
      const int first = window.first, window_end = min(kv_end, (first + 32) << page_shift);
      window.first += 32;
      if (window.first >= window.columns && fetched) window = first_pages(i + 1);
      next_ids = window.load(lane);
      for (; key < window_end; key += kUnitKeys) {
        const int32_t page = __shfl_sync(~0u, ids, (key >> page_shift) - first + box_page);
        const bool wanted = has_box && key + box_page * page_size < kv_end;

        mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
        const uint32_t boxes = __popc(__ballot_sync(~0u, wanted));
        if (lane == 0) mbarrier_arrive_expect_tx(&shared.full[ring.stage], boxes * box_bytes);
        __syncwarp();
        if (wanted) {
          uint8_t* stage = reinterpret_cast<uint8_t*>(&shared.stages[ring.stage]);
          tma_load_cache(stage + box_offset, map, &shared.full[ring.stage], key & (page_size - 1), box_slab, head, page,
                         l2_policy);
        }
        ring.advance();
      }
    }
  }
}

// The KV warp: draws work, passes it on and keeps the ring of stages full.
template <typename Traits>
__device__ __forceinline__ void produce_kv(SharedStorage<Traits>& shared, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Params& params, const FirstRange& first,
                                           TileWindow& tiles, int lane) {
  DealerOf<Traits> dealer(params.attend, first);
  const bool small = first.pages_read < params.few_pages;
  StageRing<Traits> ring;
  RingCursor<kRangeSlots> slot;
  TileRange range = first_of_cta(shared, dealer, first);
  while (true) {
    // Keys of one request make way for shared ones.
    const uint64_t l2_policy = small || dealer.on_short ? kEvictFirst : kEvictNormal;
    load_tiles(shared, k_map, v_map, params, range, tiles, ring, l2_policy, lane);
    const bool more = dealer.next(range, lane);
    mbarrier_wait(&shared.range_empty[slot.stage], slot.parity ^ 1);
    if (lane == 0) shared.ranges[slot.stage] = more ? range : TileRange{-1, -1};
    mbarrier_arrive(&shared.range_full[slot.stage]);
    slot.advance();
    if (!more) break;
  }
  wait_for_primary();  // even if it was not needed: whatever follows this kernel relies on select being over
}

// Loads the queries of a range of tiles and tells the consumers what they need to know of each.
template <typename Traits>
__device__ __forceinline__ void load_queries(SharedStorage<Traits>& shared, const Params& params, TileRange range,
                                             uint32_t& parity, int lane) {
  using Element = typename Traits::Element;
  const AttendParams& p = params.attend;
  TileInfo<Traits>& info = shared.tile;
  for (int t = range.begin; t < range.end; ++t, parity ^= 1) {
    const Tile tile = p.plan.tiles[t];
    const int first_head = tile.pair % params.by_head * params.group;
    const int queries = tile.q_count * params.group;

    // The queries themselves come first: they have the longest way.
    constexpr int kPerLane = Traits::kQueries / 32;
    int32_t token[kPerLane] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (32 * i >= queries) break;
      const int m = 32 * i + lane;
      if (m < queries) token[i] = token_of(p, tile, m / params.by_group);
    }
    mbarrier_wait(&shared.q_empty, parity);
    // A lane copies its own queries: that is little code. Where lanes shared a row it was 50 KB, 15 us of a cold step.
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int m = 32 * i + lane;
      asm volatile("" : "+r"(token[i]));  // addresses one after the other: there are few registers
      if (m < queries) {
        const Element* from = static_cast<const Element*>(p.q) + int64_t{token[i]} * p.q_stride_token +
                              (first_head + m % params.by_group) * p.q_stride_head;
        const uint32_t to = shared_address(shared.q[m / kBlockQueries]);
#pragma unroll
        for (int chunk = 0; chunk < Traits::kHeadDim / 8; ++chunk) {
          copy_async_16<Traits::kHeadDim * 2>(to + swizzled(m % kBlockQueries, chunk), from + 8 * chunk, true);
        }
      }
    }

    int32_t free_begin = tile.kv_begin, free_end = tile.kv_end;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (32 * i >= queries) break;
      const int m = 32 * i + lane;
      const int last = p.plan.positions[token[i]] - tile.kv_pos;  // the last key of the row that a causal query sees
      const int begin = p.window_left < 0 ? 0 : max(0, last - p.window_left);
      const int end = p.causal ? min(tile.kv_end, last + 1) : tile.kv_end;
      if (m < queries) {
        free_begin = max(free_begin, begin);
        free_end = min(free_end, end);
      }
      info.visible_begin[m] = begin;
      info.visible_end[m] = end;
      info.out_row[m] =
          tile.partial < 0 ? token[i] * p.num_qo_heads + first_head + m % params.by_group : tile.partial + m;
    }
    free_begin = __reduce_max_sync(~0u, free_begin);
    free_end = __reduce_min_sync(~0u, free_end);
    if (lane == 0) {
      info.queries = queries;
      info.kv_begin = tile.kv_begin;
      info.kv_end = tile.kv_end;
      info.direct = tile.partial < 0;
      info.free_begin = free_begin;
      info.free_end = free_end;
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_proxy_async();  // wgmma reads them
    mbarrier_arrive(&shared.q_full);
  }
}

// The query warp: one tile ahead of the consumers. It finds the first range by itself, so that the first queries are on
// their way before the first keys and values are, of which there are many.
template <typename Traits>
__device__ __forceinline__ void produce_queries(SharedStorage<Traits>& shared, const Params& params,
                                                const FirstRange& first, int lane) {
  RingCursor<kRangeSlots> slot;
  uint32_t parity = 1;
  TileRange range = first_of_cta(shared, DealerOf<Traits>(params.attend, first), first);
  while (range.begin >= 0) {
    load_queries(shared, params, range, parity, lane);
    mbarrier_wait(&shared.range_full[slot.stage], slot.parity);
    range = shared.ranges[slot.stage];
    mbarrier_arrive(&shared.range_empty[slot.stage]);
    slot.advance();
  }
  prefetch_merge(params.attend, lane);
  mbarrier_wait(&shared.q_empty, parity);
  if (lane == 0) shared.tile.queries = kNoMoreTiles;
  mbarrier_arrive(&shared.q_full);
}

}  // namespace flashcore::decode90
