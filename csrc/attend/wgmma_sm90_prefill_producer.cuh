// The producer warpgroup of the Hopper prefill kernel: which tile next, and its Q, K and V by TMA.
#pragma once

#include "attend/wgmma_sm90_prefill_traits.cuh"
#include "device/wgmma.cuh"

namespace flashcore::prefill {

// --- Which tile next -------------------------------------------------------------------------------------------------

// Many (row, KV head) pairs: CTAs take pairs from a shared cursor, a head's rows from the last to the first, and run
// the tiles of a pair one after another. Longest first under a causal mask, so that the CTAs end together; and CTAs
// that run together are near in the same keys, which L2 then serves. Few pairs: CTA c runs the plan's tiles of CTA c,
// where long rows are cut so that all have work.
class TileSchedule {
 public:
  __device__ explicit TileSchedule(const AttendParams& p) : p_(p), range_(blockIdx.x) {
    if (!many_pairs() && range_ < p.plan.num_ctas) open_range();
  }

  // The next tile, or -1; called by one whole warp.
  __device__ int take() {
    if (many_pairs()) {
      if (tile_ == end_ && !open_pair()) return -1;
    } else {
      while (tile_ == end_) {
        range_ += gridDim.x;
        if (range_ >= p_.plan.num_ctas) return -1;
        open_range();
      }
    }
    return tile_++;
  }

 private:
  static constexpr int kPairsPerCta = 4;

  __device__ int num_pairs() const { return p_.plan.counts[kNumRows] * p_.num_kv_heads; }
  __device__ bool many_pairs() const { return num_pairs() >= kPairsPerCta * static_cast<int>(gridDim.x); }

  __device__ void open_range() {
    tile_ = p_.plan.cta_indptr[range_];
    end_ = p_.plan.cta_indptr[range_ + 1];
  }

  __device__ bool open_pair() {
    // A CTA's first pair is its own; for each other one, and once in vain, it asks: the last one to ask wraps the
    // cursor to 0, ready for the next launch.
    int rank = blockIdx.x;
    if (opened_ && threadIdx.x % 32 == 0) {
      rank = gridDim.x + atomicInc(reinterpret_cast<unsigned*>(p_.plan.counts + kNextTile), num_pairs() - 1);
    }
    opened_ = true;
    rank = __shfl_sync(0xffffffff, rank, 0);
    if (rank >= num_pairs()) return false;
    const auto [row, head] = locate(rank);
    tile_ = p_.plan.tile_indptr[row * p_.num_kv_heads + head];
    end_ = p_.plan.tile_indptr[row * p_.num_kv_heads + head + 1];
    return true;
  }

  struct RowAndHead {
    int row, head;
  };

  // Head by head, a head's rows from the last to the first. Where requests are equally many rows long, the last heads
  // are taken together, the last rows of all their requests first: else a last row taken late keeps its CTA busy at the
  // end.
  __device__ RowAndHead locate(int rank) const {
    const int num_rows = p_.plan.counts[kNumRows];
    const int num_heads = p_.num_kv_heads;
    const int last_heads = min(num_heads, (kPairsPerCta * static_cast<int>(gridDim.x) + num_rows - 1) / num_rows);
    const int head = rank / num_rows, from_last = rank - head * num_rows;
    const int request_rows = num_rows / p_.batch;
    if (head < num_heads - last_heads || request_rows * p_.batch != num_rows ||
        p_.plan.rows[num_rows - request_rows].request != p_.batch - 1) {
      return {num_rows - 1 - from_last, head};
    }
    const int index = rank - (num_heads - last_heads) * num_rows;
    const int round = index / (last_heads * p_.batch), list = index - round * last_heads * p_.batch;
    const int request = list / last_heads;
    return {request * request_rows + request_rows - 1 - round, num_heads - last_heads + list - request * last_heads};
  }

  const AttendParams& p_;
  int range_;
  bool opened_ = false;  // a pair
  int tile_ = 0, end_ = 0;
};

// --- Producer --------------------------------------------------------------------------------------------------------

struct Maps {
  CUtensorMap q, q_token, k, v;  // q_token: boxes of one token, for rows whose tokens are scattered
  int32_t box_keys;              // keys of a box of k and v; divides page_size and kBlockKeys
};

template <typename Tr>
__device__ __forceinline__ int blocks_of(const Tile& tile) {
  return (tile.kv_end - tile.kv_begin + Tr::kBlockKeys - 1) / Tr::kBlockKeys;
}

// One thread: tells the consumers about a tile and fetches its queries.
template <typename Tr>
__device__ void load_query(const AttendParams& p, const Maps& maps, Shared<Tr>& smem, uint32_t buffer,
                           const Tile& tile) {
  const int row_index = tile.pair / p.num_kv_heads;
  const int kv_head = tile.pair - row_index * p.num_kv_heads;
  const int blocks = blocks_of<Tr>(tile);
  const Row row = p.plan.rows[row_index];
  const bool packed = row.flags & kPacked;
  const int position = packed ? 0 : p.plan.positions[row.q_begin] - row.kv_pos;
  smem.jobs[buffer] = Job{blocks,        row.q_begin, row.q_count, packed,   kv_head,
                          tile.kv_begin, tile.kv_end, row.kv_pos,  position, tile.partial};
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int tokens = blocks == 0 ? 0 : packed ? row.q_count : Tr::kRows / group;
  Mbarrier* const full = &smem.q_full[buffer];
  mbarrier_arrive_expect_tx(full, tokens * group * Tr::kHeadDim * sizeof(typename Tr::T));
  if (tokens == 0) return;
#pragma unroll 1
  for (int slab = 0; slab < Tr::kSlabs; ++slab) {
    if (!packed) {
      tma_load_query(smem.q[buffer][slab][0], &maps.q, full, row.q_begin, slab, kv_head, kEvictFirst);
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < tokens; ++i) {
      const int token = p.plan.row_tokens[row.q_begin + i];
      tma_load_query(smem.q[buffer][slab][i * group], &maps.q_token, full, token, slab, kv_head, kEvictFirst);
    }
  }
}

// The producer's warps fetch Q of each tile and, dealing its boxes among them, its blocks of K and V, last block first.
template <typename Tr>
__device__ void produce(const AttendParams& p, const Maps& maps, Shared<Tr>& smem) {
  constexpr int kBlockKeys = Tr::kBlockKeys;
  const Plan& plan = p.plan;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A block is loaded in (keys / box_keys) * kSlabs boxes; this warp issues numbers warp, warp + kProducerWarps, ...
  const int boxes = kBlockKeys / maps.box_keys * Tr::kSlabs;
  const int own_boxes = (boxes - warp + kProducerWarps - 1) / kProducerWarps;
  uint32_t kv_use = 0;  // of V; K runs one block ahead
  TileSchedule schedule(p);

  // All warps: the tile that is to be number `tiles`, or -1.
  const auto take = [&](uint32_t tiles) {
    int& next_tile = smem.next_tile[tiles % 2];
    if (warp == 0) {
      const int taken = schedule.take();
      if (lane == 0) next_tile = taken;
    }
    named_barrier_sync(kProducerBarrier, 32 * kProducerWarps);
    return next_tile;
  };
  // The first warp: tile `t` and its queries for the consumers, or the end.
  const auto announce = [&](uint32_t tiles, int t) {
    if (warp != 0) return;
    const uint32_t buffer = stage_of<Tr::kQueryBuffers>(tiles);
    mbarrier_wait(&smem.q_empty[buffer], parity_of<Tr::kQueryBuffers>(tiles) ^ 1);
    if (lane == 0 && t >= 0) load_query(p, maps, smem, buffer, plan.tiles[t]);
    if (lane == 0 && t < 0) {
      smem.jobs[buffer].blocks = kNoMoreJobs;
      mbarrier_arrive(&smem.q_full[buffer]);
    }
    __syncwarp();
  };
  // With two buffers of queries a tile is announced while the one before it begins: to find it and to fetch its queries
  // takes as long as a block or two. With one buffer its first keys go ahead.
  constexpr bool kAhead = Tr::kQueryBuffers > 1;

  uint32_t tiles = 0;
  int t = take(tiles);
  if (kAhead) announce(tiles, t);
  for (; t >= 0; ++tiles) {
    const Tile tile = plan.tiles[t];
    const int row_index = tile.pair / p.num_kv_heads;
    const int kv_head = tile.pair - row_index * p.num_kv_heads;
    const int32_t* pages = plan.kv_indices + plan.rows[row_index].page_begin;
    pages += static_cast<int64_t>(kv_head) * plan.rows[row_index].head_stride;
    const int blocks = blocks_of<Tr>(tile);

    // The page of this lane's box of a block, and the token in it. A box without keys lies outside the cache: TMA
    // writes zeros.
    const auto locate = [&](int block, int& page, int& token) {
      const int box = warp + lane * kProducerWarps;
      const int key = tile.kv_begin + block * kBlockKeys + box / Tr::kSlabs * maps.box_keys;
      const int column = key / p.page_size;
      token = key - column * p.page_size;
      page = lane < own_boxes && key < tile.kv_end ? pages[column] : p.num_pages;
    };
    const auto load = [&](auto& ring, const CUtensorMap& map, Mbarrier* full, Mbarrier* empty, uint32_t use, int page,
                          int token) {
      const uint32_t stage = stage_of<Tr::kStages>(use);
      mbarrier_wait(&empty[stage], parity_of<Tr::kStages>(use) ^ 1);
      if (lane == 0)
        mbarrier_arrive_expect_tx(&full[stage], own_boxes * maps.box_keys * kSlab * sizeof(typename Tr::T));
#pragma unroll 1
      for (int i = 0; i < own_boxes; ++i) {
        const int box_page = __shfl_sync(0xffffffff, page, i);
        const int box_token = __shfl_sync(0xffffffff, token, i);
        const int box = warp + i * kProducerWarps;
        const int slab = box % Tr::kSlabs, key = box / Tr::kSlabs * maps.box_keys;
        if (lane == 0) {
          tma_load_cache(ring[stage][slab][key], &map, &full[stage], box_token, slab, kv_head, box_page, kEvictNormal);
        }
      }
      __syncwarp();
    };
    const auto load_k = [&](uint32_t use, int page, int token) {
      load(smem.k, maps.k, smem.k_full, smem.k_empty, use, page, token);
    };
    const auto load_v = [&](uint32_t use, int page, int token) {
      load(smem.v, maps.v, smem.v_full, smem.v_empty, use, page, token);
    };

    // In the order of use: K of a block, then V of the block before it.
    int page, token;
    if (blocks > 0) {
      locate(blocks - 1, page, token);
      load_k(kv_use, page, token);
    }

    if (!kAhead) announce(tiles, t);
    const auto look_ahead = [&] {
      t = take(tiles + 1);
      if (kAhead) announce(tiles + 1, t);
    };

    for (int block = blocks - 2; block >= 0; --block, ++kv_use) {
      int next_page, next_token;
      locate(block, next_page, next_token);
      load_k(kv_use + 1, next_page, next_token);
      load_v(kv_use, page, token);
      page = next_page;
      token = next_token;
      if (block == blocks - 2) look_ahead();
    }
    if (blocks > 0) load_v(kv_use++, page, token);
    if (blocks < 2) look_ahead();
  }
  if (!kAhead) announce(tiles, t);
}

}  // namespace flashcore::prefill
