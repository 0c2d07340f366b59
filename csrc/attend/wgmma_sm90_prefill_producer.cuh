// The producer warpgroup of the Hopper prefill kernel: which tile next, and its Q, K and V by TMA.
#pragma once

#include "arithmetic.h"
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
  __device__ explicit TileSchedule(const AttendParams& p)
      : p_(p), num_pairs_(p.plan.counts[kNumRows] * p.num_kv_heads), range_(blockIdx.x) {
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

  __device__ bool many_pairs() const { return num_pairs_ >= kPairsPerCta * static_cast<int>(gridDim.x); }

  __device__ void open_range() {
    tile_ = p_.plan.cta_indptr[range_];
    end_ = p_.plan.cta_indptr[range_ + 1];
  }

  __device__ bool open_pair() {
    // A CTA's first pair is its own; for each other one, and once in vain, it asks: the last one to ask wraps the
    // cursor to 0, ready for the next launch.
    int rank = blockIdx.x;
    if (opened_ && threadIdx.x % 32 == 0) {
      rank = gridDim.x + atomicInc(reinterpret_cast<unsigned*>(p_.plan.counts + kNextTile), num_pairs_ - 1);
    }
    opened_ = true;
    rank = __shfl_sync(0xffffffff, rank, 0);
    if (rank >= num_pairs_) return false;
    const auto [row, head] = locate(rank);
    const int2 tiles = reinterpret_cast<const int2*>(p_.plan.pair_tiles)[row * p_.num_kv_heads + head];
    tile_ = tiles.x;
    end_ = tiles.y;
    return true;
  }

  struct RowAndHead {
    int row, head;
  };

  // Head by head, a head's rows from the last to the first. Where requests are equally many rows long, the last heads
  // are taken together, the last rows of all their requests first: else a last row taken late keeps its CTA busy at the
  // end.
  __device__ RowAndHead locate(int rank) const {
    const int num_heads = p_.num_kv_heads;
    const int num_rows = num_pairs_ / num_heads;
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
  int num_pairs_;
  int range_;
  bool opened_ = false;  // a pair
  int tile_ = 0, end_ = 0;
};

// --- Producer --------------------------------------------------------------------------------------------------------

struct Maps {
  CUtensorMap q, q_token, k, v;  // q_token: boxes of one token, for rows whose tokens are scattered
  int32_t box_keys;              // keys of a box of k and v; divides page_size and kBlockKeys
  Divisor by_page{1};            // page_size
};

template <typename Tr>
__device__ Job job_of(const Tile& tile, int num_kv_heads) {
  const bool packed = tile.q_begin < 0;
  return {
      .blocks = (tile.kv_end - tile.kv_begin + Tr::kBlockKeys - 1) / Tr::kBlockKeys,
      .q_begin = packed ? ~tile.q_begin : tile.q_begin,
      .q_count = tile.q_count,
      .packed = packed,
      .kv_head = tile.pair % num_kv_heads,
      .kv_begin = tile.kv_begin,
      .kv_end = tile.kv_end,
      .kv_pos = tile.kv_pos,
      .page_begin = tile.page_begin,
      .partial = tile.partial,
  };
}

// One warp: fetches the queries of a job, or none.
template <typename Tr>
__device__ void load_query(const AttendParams& p, const Maps& maps, Shared<Tr>& smem, uint32_t buffer, const Job& job) {
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int tokens = job.blocks <= 0 ? 0 : job.packed ? job.q_count : Tr::kRows / group;
  Mbarrier* const full = &smem.q_full[buffer];
  if (threadIdx.x == 0) mbarrier_arrive_expect_tx(full, tokens * group * Tr::kHeadDim * sizeof(typename Tr::T));
  const auto load = [&](const CUtensorMap& map, int i, int token) {
#pragma unroll 1
    for (int slab = 0; slab < Tr::kSlabs; ++slab) {
      tma_load_query(smem.q[buffer][slab][i * group], &map, full, token, slab, job.kv_head, kEvictFirst);
    }
  };
  if (job.packed) {  // the tokens are scattered; each lane knows where its own are
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens; i += 32) load(maps.q_token, i, p.plan.row_tokens[job.q_begin + i]);
  } else if (tokens > 0 && threadIdx.x == 0) {
    load(maps.q, 0, job.q_begin);
  }
}

// The first warp: tile after tile for all others, and its queries. A tile is announced when the one before it begins:
// to find it and to fetch its queries takes as long as a block or two.
template <typename Tr, typename Schedule>
__device__ void announce_tiles(const AttendParams& p, const Maps& maps, Shared<Tr>& smem) {
  Schedule schedule(p);
  for (uint32_t tiles = 0;; ++tiles) {
    const uint32_t slot = stage_of<kJobs>(tiles), buffer = stage_of<Tr::kQueryBuffers>(tiles);
    mbarrier_wait(&smem.job_done[slot], parity_of<kJobs>(tiles) ^ 1);
    const int t = schedule.take();
    Job job{.blocks = kNoMoreJobs};
    if (t >= 0) {
      const Tile tile = p.plan.tiles[t];
      job = job_of<Tr>(tile, p.num_kv_heads);
    }
    if (threadIdx.x == 0) {
      smem.jobs[slot] = job;
      mbarrier_arrive(&smem.job_full[slot]);
    }
    // With one buffer of queries the tile before has to be done with it.
    if (Tr::kQueryBuffers == 1) mbarrier_wait(&smem.job_done[slot ^ 1], parity_of<kJobs>(tiles + 1) ^ 1);
    if (threadIdx.x == 0 && t >= 0 && !job.packed) {
      smem.jobs[slot].position = p.plan.positions[job.q_begin] - job.kv_pos;
    }
    load_query(p, maps, smem, buffer, job);
    __syncwarp();
    if (t < 0) return;
  }
}

// The next kLoadWarps warps: the tiles' blocks of K and V, last block first, the boxes of a block dealt among them.
template <typename Tr>
__device__ void load_keys(const AttendParams& p, const Maps& maps, Shared<Tr>& smem) {
  constexpr int kBlockKeys = Tr::kBlockKeys;
  const int warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32;
  // A block is loaded in boxes of box_keys keys, slab by slab; this warp has boxes warp, warp + kLoadWarps, ...
  const int boxes = kBlockKeys / maps.box_keys;
  const int own_boxes = (boxes - warp + kLoadWarps - 1) / kLoadWarps;
  const uint32_t own_bytes = own_boxes * maps.box_keys * Tr::kHeadDim * sizeof(typename Tr::T);
  uint32_t kv_use = 0;  // of V; K runs one block ahead

  for (uint32_t tiles = 0;; ++tiles) {
    const uint32_t slot = stage_of<kJobs>(tiles);
    mbarrier_wait(&smem.job_full[slot], parity_of<kJobs>(tiles));
    const Job& job = smem.jobs[slot];
    const int blocks = job.blocks, kv_begin = job.kv_begin, kv_end = job.kv_end, kv_head = job.kv_head;
    const int32_t* const pages = p.plan.kv_indices + job.page_begin;
    if (blocks == kNoMoreJobs) return;
    mbarrier_arrive(&smem.job_done[slot]);

    // Where this lane's box of a block is. One without keys lies outside the cache: TMA writes zeros.
    const auto locate = [&](int block, int& page, int& token) {
      const int key = kv_begin + block * kBlockKeys + (warp + lane * kLoadWarps) * maps.box_keys;
      const int column = key / maps.by_page;
      token = key - column * p.page_size;
      page = lane < own_boxes && key < kv_end ? pages[column] : p.num_pages;
    };
    const auto load = [&](auto& ring, const CUtensorMap& map, Mbarrier* full, Mbarrier* empty, uint32_t use, int page,
                          int token) {
      const uint32_t stage = stage_of<Tr::kStages>(use);
      mbarrier_wait(&empty[stage], parity_of<Tr::kStages>(use) ^ 1);
      if (lane == 0) mbarrier_arrive_expect_tx(&full[stage], own_bytes);
#pragma unroll 1
      for (int i = 0; i < own_boxes; ++i) {
        const int box_page = __shfl_sync(0xffffffff, page, i);
        const int box_token = __shfl_sync(0xffffffff, token, i);
        if (lane != 0) continue;
        const int key = (warp + i * kLoadWarps) * maps.box_keys;
#pragma unroll
        for (int slab = 0; slab < Tr::kSlabs; ++slab) {
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
    if (blocks == 0) continue;
    int page, token;
    locate(blocks - 1, page, token);
    load_k(kv_use, page, token);
    for (int block = blocks - 2; block >= 0; --block, ++kv_use) {
      int next_page, next_token;
      locate(block, next_page, next_token);
      load_k(kv_use + 1, next_page, next_token);
      load_v(kv_use, page, token);
      page = next_page;
      token = next_token;
    }
    load_v(kv_use++, page, token);
  }
}

}  // namespace flashcore::prefill
