// Decode on Hopper: which CTA takes which tiles.
#pragma once

#include <type_traits>

#include "attend/wgmma_sm90_decode_plan.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"

namespace flashcore::decode90 {

// Deals ranges of tiles in the order of the plan: the first ones by CTA, the others to whoever is free, since an SM's
// share of the bandwidth depends on its neighbours (up to a third more where a GPC has fewer SMs) and equal shares
// would not end together.
//
// Where no prefix is shared there is one queue, of the plan's ranges. Where one is, there are two: the tall tiles, one
// by one, and stretches of the short ones. Half of the CTAs begin with the tall ones and half with the short ones, one
// an SM of each, so that the tensor cores and L2 work while memory does; who finds his queue empty turns to the other.
// An SM has CTAs i and i + half, or i and i + 1 where it was the first to be free. Tall tiles of the same keys are near
// each other in the plan: they run together, and all but the first find these keys in L2.
struct Dealer {
  const Plan& plan;
  int num_tall = 0, num_tiles = 0, stretch = 0;  // stretch 0: ranges
  int queues_left;
  bool on_short = false;

  __device__ __forceinline__ Dealer(const AttendParams& p, const FirstRange& first) : plan(p.plan) {
    const int num_ctas = gridDim.x;
    if (first.rows_packed == 0) {
      queues_left = num_ctas < plan.num_ctas;
      return;
    }
    num_tiles = first.num_tiles;
    num_tall = plan.packed_end(first.rows_packed, p.num_kv_heads);
    stretch = max(1, (num_tiles - num_tall) / (kStretchesPerCta * num_ctas));
    queues_left = 2;
    on_short = (blockIdx.x + blockIdx.x / half()) % 2;
  }

  __device__ __forceinline__ TileRange first(const FirstRange& first) const {
    return stretch == 0 ? first.tiles : range_of(blockIdx.x / 2);
  }

  // False: nothing is left.
  __device__ __forceinline__ bool next(TileRange& range, int lane) {
    for (; queues_left > 0; --queues_left, on_short = !on_short) {
      const int items = num_items();
      const int item = __shfl_sync(~0u, lane == 0 ? draw(items) : 0, 0);
      if (item >= items) continue;
      range = range_of(item);
      return true;
    }
    return false;
  }

 private:
  // Of the current queue: how many items there are, and how many CTAs begin with one.
  __device__ __forceinline__ int num_items() const {
    if (stretch == 0) return plan.num_ctas;
    return on_short ? (num_tiles - num_tall + stretch - 1) / stretch : num_tall;
  }
  __device__ __forceinline__ int num_dealt() const {
    if (stretch == 0) return gridDim.x;
    const int tall = half() / 2 + (static_cast<int>(gridDim.x) - half()) / 2;
    return on_short ? gridDim.x - tall : tall;
  }
  static __device__ __forceinline__ int half() { return (gridDim.x + 3) / 4 * 2; }  // an even number

  __device__ __forceinline__ TileRange range_of(int item) const {
    if (stretch == 0) return {plan.cta_indptr[item], plan.cta_indptr[item + 1]};
    if (!on_short) return {min(item, num_tall), min(item + 1, num_tall)};
    const int begin = min(num_tall + item * stretch, num_tiles);
    return {begin, min(begin + stretch, num_tiles)};
  }

  // The next item of the current queue, or one behind the last. The counters are zero between launches: every CTA draws
  // once in vain, and the last one leaves the counter as found.
  __device__ __forceinline__ int draw(int items) const {
    int32_t* drawn = plan.counts + (on_short ? kNextShortTile : kNextTile);
    const int dealt = num_dealt(), ticket = atomicAdd(drawn, 1);
    if (ticket == max(items - dealt, 0) + static_cast<int>(gridDim.x) - 1) *drawn = 0;
    return dealt + ticket;
  }
};

// The same where packed rows are another kernel's. Where there are any: stretches of the tiles behind theirs, for the
// CTAs that do not leave.
struct ApartDealer {
  const Plan& plan;
  int begin = 0, tiles = 0, stretch = 0;  // of tiles that are not packed rows'
  int items, dealt = 0;
  const bool on_short;  // there are packed rows, and so stretches instead of ranges

  __device__ __forceinline__ ApartDealer(const AttendParams& p, const FirstRange& first)
      : plan(p.plan), items(plan.num_ctas), on_short(first.rows_packed > 0) {
    if (!on_short) {
      dealt = gridDim.x;
      return;
    }
    begin = plan.packed_end(first.rows_packed, p.num_kv_heads);
    tiles = first.num_tiles - begin;
    stretch = max(1, tiles / (kStretchesPerCta * static_cast<int>(gridDim.x)));
    items = ceil_div(tiles, stretch);
  }

  // Both CTAs of an SM leave, on SMs that lie evenly among all. Two CTAs stay wherever they are: someone has to.
  static __device__ __forceinline__ bool leaves(const AttendParams& p) {
    int sm;
    asm("mov.u32 %0, %%smid;" : "=r"(sm));
    const int left = left_sms(p);
    return blockIdx.x >= 2 && sm * left % p.num_sms < left;
  }
  // By one thread of a CTA that draws nothing, or nothing more. The last one leaves the cursor as found, zero.
  static __device__ __forceinline__ void retire(const Plan& plan) {
    int32_t* const cursor = plan.counts + kNextShortTile;
    if (atomicAdd(cursor, kOneCta) / kOneCta == static_cast<int>(gridDim.x) - 1) *cursor = 0;
  }

  // By one thread of the CTA.
  __device__ __forceinline__ TileRange first(const FirstRange& first) const {
    return on_short ? range_of(draw()) : first.tiles;
  }

  // False: nothing is left, and it must not be asked again.
  __device__ __forceinline__ bool next(TileRange& range, int lane) const {
    if (!on_short && items <= dealt) return false;
    const int item = dealt + __shfl_sync(~0u, lane == 0 ? draw() : 0, 0);
    if (item >= items) {
      if (lane == 0) retire(plan);
      return false;
    }
    range = range_of(item);
    return true;
  }

 private:
  static constexpr int kOneCta = 1 << 20;  // the cursor counts draws, and from here on CTAs that have retired

  __device__ __forceinline__ int draw() const { return atomicAdd(plan.counts + kNextShortTile, 1) % kOneCta; }
  __device__ __forceinline__ TileRange range_of(int item) const {
    if (!on_short) return {plan.cta_indptr[item], plan.cta_indptr[item + 1]};
    return {begin + min(item * stretch, tiles), begin + min((item + 1) * stretch, tiles)};
  }
};

template <typename Traits>
using DealerOf = std::conditional_t<Traits::kApart, ApartDealer, Dealer>;

// The first range of the CTA: known to each warp, or one thread has drawn it.
template <typename Traits>
__device__ __forceinline__ TileRange first_of_cta(const SharedStorage<Traits>& shared, const DealerOf<Traits>& dealer,
                                                  const FirstRange& first) {
  if constexpr (Traits::kApart) {
    return shared.first;
  } else {
    return dealer.first(first);
  }
}

}  // namespace flashcore::decode90
