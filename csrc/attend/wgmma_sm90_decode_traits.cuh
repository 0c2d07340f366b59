// Decode on Hopper: the sizes, the shared memory and the few helpers that its warps agree on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "arithmetic.h"
#include "device/mbarrier.cuh"
#include "device/tma.cuh"
#include "params.h"

namespace flashcore::decode90 {

constexpr int kUnitKeys = kSplitUnit;  // keys of a pipeline stage
constexpr int kBlockQueries = 64;      // packed queries of one wgmma
constexpr int kConsumerWarps = 4;      // one warpgroup
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kThreads = 2 * kConsumers;  // and a warpgroup of producers: KV, queries, two that leave at once
constexpr int kWarpKeys = kUnitKeys / kConsumerWarps;  // keys of a unit that a consumer warp takes in a short tile
constexpr int kShortQueries = 16;                      // at most this many queries go the mma.sync way
constexpr int kFewQueries = 2 * kShortQueries;         // so many in all have a kernel of their own
constexpr int kSlabBytes = kUnitKeys * 128;
constexpr int kConsumerBarrier = 1;  // named barrier of the consumer warpgroup
constexpr int kRangeSlots = 4;       // ranges of tiles that the KV warp may be ahead of the query warp
constexpr int kStretchesPerCta = 4;  // where prefixes are shared: pieces a CTA's share of the short tiles is dealt in

// Up to this many bytes of KV are read evict-first: they are gone after this launch either way, and so they do not push
// other kernels' lines out of L2, which costs a write where these are dirty. Where the launch is long that is small,
// and evict-first lines were seen to be dropped before they were used (3 % slower).
constexpr int64_t kSmallBytes = int64_t{256} << 20;

// kBlocks blocks of 64 packed queries are what a tile may hold; 0: packed rows are another kernel's.
template <typename T, int kHeadDim_, int kBlocks_, int kStages_>
struct Traits {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kApart = kBlocks_ == 0;
  static constexpr int kBlocks = kApart ? 1 : kBlocks_;
  static constexpr int kQueries = kBlocks * kBlockQueries;
  static constexpr int kStages = kStages_;
  static constexpr int kSlabs = kHeadDim / kSlab;
  static constexpr int kOperandBytes = kSlabs * kSlabBytes;  // K or V of a stage
};

constexpr int32_t kNoMoreTiles = -1;

// Which plans a launch is for, by what stands in them; it leaves the others alone.
enum class Serves : int32_t { all, sharing, not_sharing };

struct Params {
  AttendParams attend;
  Serves serves;
  bool dependent;  // launched before the kernel in front of it ends: select, or the first of two in a row
  int32_t group;
  Divisor by_group{1}, by_head{1};  // group, num_kv_heads
  int32_t few_pages;                // a plan that reads fewer than this is small
  int32_t page_shift;               // log2(page_size)
  int32_t box_tokens;               // tokens of a TMA box: a page, or a unit of it
  int32_t box_slabs;                // slabs of a TMA box: all where it fills a unit, else one
  float softmax_scale;              // logits in base 2 are raw * softmax_scale, after the cap where there is one
  float cap_scale;                  // raw = tanh(raw * cap_scale); 0: no cap
};

// What the consumers must know of a tile, written by the query warp beside the queries themselves.
template <typename Traits>
struct TileInfo {
  int32_t queries;  // kNoMoreTiles: the CTA is done
  int32_t kv_begin, kv_end;
  int32_t direct;                // rows go to out and lse, else to the partials
  int32_t free_begin, free_end;  // keys in here are visible to every query: no mask needed
  int32_t visible_begin[Traits::kQueries], visible_end[Traits::kQueries];  // keys that a query sees
  int32_t out_row[Traits::kQueries];                                       // row of out and lse, or of the partials
};

struct TileRange {
  int begin, end;
};

// What a warp of a short tile has of 8 queries, for the other warps.
template <int kHeadDim>
struct Share {
  float o[8][kHeadDim];  // channel d of query m at d ^ 8 * (m / 2): no bank conflicts
  float2 stats[8];       // (maximum, sum)
};

// The stage of a tile's last unit holds the warps' shares once the unit is consumed.
template <typename Traits>
union Stage {
  struct {
    uint8_t k[Traits::kOperandBytes];  // [slabs][64 keys][128 bytes], swizzled
    uint8_t v[Traits::kOperandBytes];
  };
  Share<Traits::kHeadDim> shares[kConsumerWarps];
};

template <typename Traits>
struct SharedStorage {
  Stage<Traits> stages[Traits::kStages];
  uint8_t q[Traits::kBlocks][Traits::kOperandBytes];  // [slabs][64 queries][128 bytes], swizzled
  TileInfo<Traits> tile;
  Mbarrier full[Traits::kStages], empty[Traits::kStages];
  Mbarrier q_full, q_empty;
  Mbarrier range_full[kRangeSlots], range_empty[kRangeSlots];
  TileRange first;                // kApart: of the CTA
  TileRange ranges[kRangeSlots];  // from the KV warp, which draws them, to the query warp; begin < 0: no more
};

template <typename Traits>
using StageRing = RingCursor<Traits::kStages>;

// Byte offset of 16-byte chunk `chunk` of a row in a swizzled [slabs][64][128 bytes] operand.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return chunk / 8 * kSlabBytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

// Hands a buffer back (or over): all accesses of the warp come before its one arrival.
__device__ __forceinline__ void release(Mbarrier* barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barrier);
}

// Zeroes V of keys [first, 64) of a unit among rows [row_begin, row_end): their P is 0, but 0 * NaN would be NaN.
template <typename Traits>
__device__ __forceinline__ void zero_values(Stage<Traits>& stage, int first, int row_begin, int row_end, int lane) {
  constexpr int kChunks = Traits::kHeadDim / 8;
  for (int i = max(first, row_begin) * kChunks + lane; i < row_end * kChunks; i += 32) {
    *reinterpret_cast<uint4*>(stage.v + swizzled(i / kChunks, i % kChunks)) = make_uint4(0, 0, 0, 0);
  }
  fence_proxy_async();
  __syncwarp();
}

}  // namespace flashcore::decode90
