// Decode on Hopper, the producers: one warp keeps the ring of KV stages full, another fetches each tile's queries.
// Both run ahead of the consumers across tiles, so that the next tile's bytes are in flight while this one ends.
#pragma once

#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/async_copy.cuh"

namespace flashcore::decode90 {

// Ranges of tiles are dealt in the order of the plan: the first one by CTA, the others to whoever is free. CTAs that
// stay close together in the plan find each other's shared pages in L2, and an SM's share of the bandwidth depends on
// its neighbours (up to a third more where a GPC has fewer SMs), so that equal shares would not end together.
struct RangeDealer {
  int32_t* tickets;
  int num_ranges;

  // The next range, or num_ranges and above when there is none: then the CTA asks no more. One lane calls.
  __device__ __forceinline__ int next() const {
    const int num_ctas = gridDim.x;
    if (num_ctas >= num_ranges) return num_ranges;
    const int ticket = atomicAdd(tickets, 1);
    if (ticket == num_ranges - 1) *tickets = 0;  // every CTA has drawn its last: leave it as found
    return num_ctas + ticket;
  }
};

// Page columns [0, columns) of the tiles of a CTA, 32 at a time: lane l holds column first + l of the current window.
struct PageWindow {
  const int32_t* pages;
  int first, columns;

  __device__ __forceinline__ int32_t load(int lane) const {
    const int column = first + lane;
    return column < columns ? __ldg(pages + column) : 0;
  }
};

// Loads the keys and values of tiles [tile_begin, tile_end), unit by unit. Lane i issues box i of a unit.
template <typename Traits>
__device__ __forceinline__ void load_tiles(SharedStorage<Traits>& shared, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Params& params, int tile_begin, int tile_end,
                                           StageRing<Traits>& ring, uint64_t l2_policy, int lane) {
  const Plan& plan = params.attend.plan;
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

  for (int base = tile_begin; base < tile_end; base += 32) {
    // One round trip fetches the metadata of 32 tiles; a CTA rarely has more.
    Tile tile{};
    const int32_t* pages = plan.kv_indices;
    int head = 0;
    if (base + lane < tile_end) {
      tile = plan.tiles[base + lane];
      const int row_index = tile.pair / params.attend.num_kv_heads;
      const Row& row = plan.rows[row_index];
      head = tile.pair - row_index * params.attend.num_kv_heads;
      pages += row.page_begin + static_cast<int64_t>(head) * row.head_stride;
    }
    const int tiles = min(32, tile_end - base);

    auto window_of = [&](int i, int key) {
      const uint64_t address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(pages), i);
      const int kv_end = __shfl_sync(~0u, tile.kv_end, i);
      return PageWindow{reinterpret_cast<const int32_t*>(address), key >> page_shift,
                        (kv_end + page_size - 1) >> page_shift};
    };
    PageWindow window = window_of(0, __shfl_sync(~0u, tile.kv_begin, 0));
    int32_t next_ids = window.load(lane);

    for (int i = 0; i < tiles; ++i) {
      const int kv_begin = __shfl_sync(~0u, tile.kv_begin, i);
      const int kv_end = __shfl_sync(~0u, tile.kv_end, i);
      const int tile_head = __shfl_sync(~0u, head, i);
      const int next_begin = __shfl_sync(~0u, tile.kv_begin, i + 1 < tiles ? i + 1 : i);
      int32_t ids = 0;
      for (int key = kv_begin; key < kv_end; key += kUnitKeys) {
        const int column = key >> page_shift;
        if (key == kv_begin || column - window.first == 32) {
          // Take the window fetched before and fetch the one after it: this tile's or the next tile's.
          if (key != kv_begin) window.first = column;
          ids = next_ids;
          PageWindow after = window;
          after.first += 32;
          next_ids = (after.first < after.columns || i + 1 == tiles ? after : window_of(i + 1, next_begin)).load(lane);
        }
        const int32_t page = __shfl_sync(~0u, ids, column - window.first + box_page);
        const bool wanted = has_box && key + box_page * page_size < kv_end;

        mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
        const uint32_t boxes = __popc(__ballot_sync(~0u, wanted));
        if (lane == 0) mbarrier_arrive_expect_tx(&shared.full[ring.stage], boxes * box_bytes);
        __syncwarp();
        if (wanted) {
          uint8_t* stage = reinterpret_cast<uint8_t*>(&shared.stages[ring.stage]);
          tma_load_cache(stage + box_offset, map, &shared.full[ring.stage], key & (page_size - 1), box_slab, tile_head,
                         page, l2_policy);
        }
        ring.advance();
      }
      if (i + 1 < tiles) {
        window = window_of(i + 1, next_begin);
        if (kv_begin == kv_end) next_ids = window.load(lane);
      }
    }
  }
}

// What the KV warp needs first; loaded before anything else, since all that follows hangs on it.
struct FirstRange {
  int tile_begin, tile_end, pages_read;

  __device__ __forceinline__ explicit FirstRange(const Plan& plan)
      : tile_begin(plan.cta_indptr[blockIdx.x]),
        tile_end(plan.cta_indptr[blockIdx.x + 1]),
        pages_read(plan.counts[kPagesRead]) {}
};

// The KV warp: draws ranges, passes them on and keeps the ring of stages full.
template <typename Traits>
__device__ __forceinline__ void produce_kv(SharedStorage<Traits>& shared, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Params& params, const FirstRange& first,
                                           int lane) {
  const Plan& plan = params.attend.plan;
  const RangeDealer dealer{params.next_range, plan.num_ctas};
  const uint64_t l2_policy = first.pages_read < params.few_pages ? kEvictFirst : kEvictNormal;
  StageRing<Traits> ring;
  RingCursor<kRangeSlots> slot;
  int range = blockIdx.x;
  int tile_begin = first.tile_begin, tile_end = first.tile_end;
  while (true) {
    mbarrier_wait(&shared.range_empty[slot.stage], slot.parity ^ 1);
    if (lane == 0)
      shared.ranges[slot.stage] = range < plan.num_ctas ? make_int2(tile_begin, tile_end) : make_int2(-1, -1);
    mbarrier_arrive(&shared.range_full[slot.stage]);
    slot.advance();
    if (range >= plan.num_ctas) return;
    load_tiles(shared, k_map, v_map, params, tile_begin, tile_end, ring, l2_policy, lane);
    if (lane == 0) range = dealer.next();
    range = __shfl_sync(~0u, range, 0);
    if (range < plan.num_ctas) {
      tile_begin = plan.cta_indptr[range];
      tile_end = plan.cta_indptr[range + 1];
    }
  }
}

// Loads the queries of tiles [tile_begin, tile_end) and tells the consumers what they need to know of each.
template <typename Traits>
__device__ __forceinline__ void load_queries(SharedStorage<Traits>& shared, const Params& params, int tile_begin,
                                             int tile_end, uint32_t& parity, int lane) {
  using Element = typename Traits::Element;
  const AttendParams& p = params.attend;
  TileInfo<Traits>& info = shared.tile;
  for (int t = tile_begin; t < tile_end; ++t, parity ^= 1) {
    const Tile tile = p.plan.tiles[t];
    const int row_index = tile.pair / p.num_kv_heads;
    const Row row = p.plan.rows[row_index];
    const int first_head = (tile.pair - row_index * p.num_kv_heads) * params.group;
    const int queries = row.q_count * params.group;

    // The queries themselves come first: they have the longest way.
    constexpr int kPerLane = Traits::kQueries / 32;
    int64_t source[kPerLane] = {};
    int32_t position[kPerLane] = {}, out_row[kPerLane] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (32 * i >= queries) break;
      const int m = 32 * i + lane;
      if (m < queries) {
        const int index = row.q_begin + m / params.group;
        const int token = row.flags & kPacked ? p.plan.row_tokens[index] : index;
        const int head = first_head + m % params.group;
        source[i] = token * p.q_stride_token + head * p.q_stride_head;
        position[i] = p.plan.positions[token];
        out_row[i] = tile.partial < 0 ? token * p.num_qo_heads + head : tile.partial + m;
      }
    }
    mbarrier_wait(&shared.q_empty, parity);
    constexpr int kRowLanes = Traits::kHeadDim / 8;  // lanes that copy a row, 16 bytes each
    constexpr int kRowsAtOnce = 32 / kRowLanes;
    const Element* q = static_cast<const Element*>(p.q);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      for (int first = 0; first < 32 && 32 * i + first < queries; first += kRowsAtOnce) {
        const int m = 32 * i + first + lane / kRowLanes;
        const int64_t offset = __shfl_sync(~0u, source[i], m % 32);
        if (m < queries) {
          uint8_t* block = shared.q[m / kBlockQueries];
          copy_async_16<Traits::kHeadDim * 2>(shared_address(block + swizzled(m % kBlockQueries, lane % kRowLanes)),
                                              q + offset + lane % kRowLanes * 8, true);
        }
      }
    }

    int32_t free_begin = tile.kv_begin, free_end = tile.kv_end;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (32 * i >= queries) break;
      const int m = 32 * i + lane;
      const int last = position[i] - row.kv_pos;  // the last key of the row that a causal query sees
      const int begin = p.window_left < 0 ? 0 : max(0, last - p.window_left);
      const int end = p.causal ? min(tile.kv_end, last + 1) : tile.kv_end;
      if (m < queries) {
        free_begin = max(free_begin, begin);
        free_end = min(free_end, end);
      }
      info.visible_begin[m] = begin;
      info.visible_end[m] = end;
      info.out_row[m] = out_row[i];
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

// The query warp: one tile ahead of the consumers.
template <typename Traits>
__device__ __forceinline__ void produce_queries(SharedStorage<Traits>& shared, const Params& params, int lane) {
  RingCursor<kRangeSlots> slot;
  uint32_t parity = 1;
  while (true) {
    mbarrier_wait(&shared.range_full[slot.stage], slot.parity);
    const int2 tiles = shared.ranges[slot.stage];
    mbarrier_arrive(&shared.range_empty[slot.stage]);
    slot.advance();
    if (tiles.x < 0) break;
    load_queries(shared, params, tiles.x, tiles.y, parity, lane);
  }
  mbarrier_wait(&shared.q_empty, parity);
  if (lane == 0) shared.tile.queries = kNoMoreTiles;
  mbarrier_arrive(&shared.q_full);
}

// Brings the beginnings of what the producers read first to L2, each CTA a few lines: their loads depend on one
// another, and where little is to be read these misses would be most of the time.
__device__ __forceinline__ void prefetch_metadata(const AttendParams& p, int lane) {
  constexpr int kLine = 128, kLinesPerCta = 4;
  const auto prefetch = [&](const void* table, int64_t bytes) {
    const int64_t offset = static_cast<int64_t>(kLine) * (blockIdx.x + gridDim.x * (lane % kLinesPerCta));
    if (offset < bytes) prefetch_l2(static_cast<const uint8_t*>(table) + offset);
  };
  switch (lane / kLinesPerCta) {
    case 0:
      return prefetch(p.plan.tiles, p.plan.max_tiles * sizeof(Tile));
    case 1:
      return prefetch(p.plan.rows, p.plan.max_rows * sizeof(Row));
    case 2:
      return prefetch(p.plan.kv_indices, p.plan.max_pages * sizeof(int32_t));
    case 3:
      return prefetch(p.plan.row_tokens, p.plan.max_row_tokens * sizeof(int32_t));
    case 4:
      return prefetch(p.plan.positions, p.num_tokens * sizeof(int32_t));
    case 5:
      return prefetch(p.q, p.num_tokens * p.q_stride_token * sizeof(uint16_t));
  }
}

}  // namespace flashcore::decode90
