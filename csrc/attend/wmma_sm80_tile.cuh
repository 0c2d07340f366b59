// wmma_sm80: what a tile is made of: traits, the layout of shared memory, the queries of a tile and what they may see.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <climits>

#include "params.h"

namespace flashcore::wmma_sm80 {

// ------------------------------------------------------------------------------------------ traits

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kShortRows = 16;

template <typename Element_, int kHeadDim_, int kMTiles_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kMTiles = kMTiles_;             // 16-row tiles of a warp in a tall tile
  static constexpr int kRows = 16 * kMTiles * kWarps;  // packed queries of a tall tile
  // A third CTA hides the start of tiles and the softmax; from 96 dims on, O and S leave no registers for it.
  static constexpr int kCtasPerSm = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kRingBytes = (kCtasPerSm == 3 ? 64 : 96) * 1024;  // K and V stages, and Q of a tall tile
  static constexpr int kQBytes = kRows * kHeadDim * 2;
  static constexpr bool kQInRegisters = kMTiles == 1 && kHeadDim <= 128;  // where they fit beside O and S
  // Keys of a block: a tall tile's S must fit the registers beside O; a short tile wants blocks worth their barrier.
  static constexpr int kTallKeys = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kShortKeys = kHeadDim <= 64 ? 128 : kTallKeys;
  static constexpr int kTallStages = (kRingBytes - kQBytes) / (kTallKeys * kHeadDim * 4);
  static constexpr int kShortStages = kRingBytes / (kShortKeys * kHeadDim * 4);
  static constexpr int kMaxStreamKeys =
      kTallStages * kTallKeys > kShortStages* kShortKeys ? kTallStages * kTallKeys : kShortStages * kShortKeys;
  // Short tiles: at least 16 keys a warp; a block with less for each deals the head dimension of V to the other warps.
  static constexpr int kKeyWarps = kShortKeys / 16 < kWarps ? kShortKeys / 16 : kWarps;
  static constexpr int kDimWarps = kWarps / kKeyWarps;
  static_assert(kTallStages >= 2 && kKeyWarps * kDimWarps == kWarps && kHeadDim % 32 == 0 && kRows <= kThreads);
};

// A [rows, kHeadDim] tile of 16-bit elements in shared memory. Rows of 8n chunks all start in the same bank, so eight
// chunks trade places; with 12 chunks (96 dims) every other row does, and four suffice.
template <int kHeadDim>
struct SwizzledTile {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : 4;

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int mix = kPeriod == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + (chunk ^ mix) * 16;
  }

  // Deals the chunks of the first kRows rows to the threads: visit(row, chunk). Each thread keeps its chunk, and its
  // rows lie a constant apart.
  template <int kRows, typename Visit>
  static __device__ __forceinline__ void for_each_chunk(Visit&& visit) {
    constexpr int kPassRows = std::bit_floor(static_cast<unsigned>(kThreads / kChunks));
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    if (row >= kPassRows) return;
#pragma unroll
    for (int pass = 0; pass < kRows; pass += kPassRows) visit(row + pass, chunk);
  }
};

// Where one lane points ldmatrix: at (row, chunk) of a tile, then 8n rows and 16n dims on, both known at compile time.
// The dims in a period only flip address bits, those that the tile's alignment leaves to the chunk.
template <int kHeadDim>
struct FragmentPointer {
  using Tile = SwizzledTile<kHeadDim>;
  uint32_t offset;

  __device__ __forceinline__ FragmentPointer(int row, int chunk) : offset(Tile::offset(row, chunk)) {}
  __device__ __forceinline__ uint32_t at(uint32_t tile, int rows, int dims) const {
    constexpr int kPeriodBytes = Tile::kPeriod * 16;
    return ((tile + offset) ^ (2 * dims % kPeriodBytes)) + 2 * dims / kPeriodBytes * kPeriodBytes +
           rows * Tile::kRowBytes;
  }
};

// ------------------------------------------------------------------------------ shared memory plan

template <typename Element>
struct KeyAddress {
  const Element* k;  // the key's row of the KV head
  const Element* v;
};

// One packed query of a tile.
struct RowInfo {
  int64_t q_offset;  // elements from q; -1: padding
  int32_t position;  // of the token, counted from the row's first key
  int32_t out_row;   // token * num_qo_heads + head
};

// A tile and its row. Read one tile ahead: two dependent loads that nobody waits for.
struct Work {
  Tile tile;
  Row row;
  const int32_t* pages;  // of the row, for the KV head
  int kv_head;
  int num_rows;  // packed queries
};

template <class Traits>
struct SharedMemory {
  alignas(1024) unsigned char ring[Traits::kRingBytes];
  KeyAddress<typename Traits::Element> addresses[Traits::kMaxStreamKeys];  // of one block a stage
  RowInfo rows[Traits::kRows];
  Work work[2];  // this tile's and the next one's
};

// Short tiles leave the accumulators of each warp in the ring; the pad spreads the rows of a fragment over the banks.
template <class Traits>
struct WarpResults {
  static constexpr int kStride = Traits::kHeadDim + 8;
  float o[Traits::kKeyWarps][kShortRows][kStride];
  float max[Traits::kKeyWarps][kShortRows];
  float sum[Traits::kKeyWarps][kShortRows];
};

// ----------------------------------------------------------------------- queries and what they see

__device__ __forceinline__ Work read_work(const AttendParams& p, int index) {
  Work work;
  work.tile = p.plan.tiles[index];
  work.row = p.plan.rows[work.tile.pair / p.num_kv_heads];
  work.kv_head = work.tile.pair % p.num_kv_heads;
  work.pages = p.plan.kv_indices + work.row.page_begin + int64_t{work.kv_head} * work.row.head_stride;
  work.num_rows = work.row.q_count * (p.num_qo_heads / p.num_kv_heads);
  return work;
}

__device__ __forceinline__ RowInfo describe_row(const AttendParams& p, const Work& work, int m) {
  if (m >= work.num_rows) return {-1, 0, 0};
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int index = work.row.q_begin + m / group;
  const int token = work.row.flags & kPacked ? p.plan.row_tokens[index] : index;
  const int head = work.kv_head * group + m % group;
  return {token * p.q_stride_token + head * p.q_stride_head, p.plan.positions[token] - work.row.kv_pos,
          token * p.num_qo_heads + head};
}

// Keys [first, last] are visible to a query.
struct Visible {
  int first, last;

  __device__ __forceinline__ Visible(const AttendParams& p, const Work& work, int position) {
    first = p.window_left < 0 ? 0 : position - p.window_left;
    last = min(p.causal ? position : INT_MAX, work.tile.kv_end - 1);
  }
};

// What a warp's queries see together: nothing outside `any`, and no mask is needed inside `all`.
template <int kRows>
struct WarpVisible {
  int any_first, any_last, all_first, all_last;

  __device__ __forceinline__ WarpVisible(const AttendParams& p, const Work& work, const RowInfo* rows) {
    any_first = all_last = INT_MAX;
    all_first = any_last = INT_MIN;
    const int lane = threadIdx.x % 32;
    if (lane < kRows && rows[lane].q_offset >= 0) {
      const Visible visible(p, work, rows[lane].position);
      any_first = all_first = visible.first;
      any_last = all_last = visible.last;
    }
    any_first = __reduce_min_sync(~0u, any_first);
    any_last = __reduce_max_sync(~0u, any_last);
    all_first = __reduce_max_sync(~0u, all_first);
    all_last = __reduce_min_sync(~0u, all_last);
  }
  __device__ __forceinline__ bool skips(int begin, int end) const { return begin > any_last || end <= any_first; }
  __device__ __forceinline__ bool masks(int begin, int end) const { return begin < all_first || end - 1 > all_last; }
};

}  // namespace flashcore::wmma_sm80
