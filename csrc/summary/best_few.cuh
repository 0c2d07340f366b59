// The choice of a few columns among many, by comparing each with the others that come into question.
//
// The columns are dealt into groups, neighbours into different ones: pages that matter lie together. As many groups as
// columns are wanted have a best key of at least `floor`, so the columns that reach it are enough, and not many more:
// of 2000 about 80 where 61 are wanted. Each of them is compared with all of them; those that fewer are above are
// chosen, and what stands before one in the list is counted in a bitmap.
//
// threshold.cuh chooses any number of any columns, in two or three rounds of more steps.
#pragma once

#include <cuda_runtime.h>

#include "arithmetic.h"
#include "device/async_copy.cuh"
#include "plan/cta.cuh"

namespace flashcore {

// What the threads of a CTA choose in. Two threads have a group, and later a candidate.
template <int kThreads_, int kMostColumns_>
struct BestFew {
  static constexpr int kThreads = kThreads_, kMostColumns = kMostColumns_;
  static constexpr int kGroups = kThreads / 2, kMostCandidates = kThreads / 2;
  static constexpr int kMostWanted = kGroups * 3 / 4;
  static constexpr int kHeld = kMostColumns / kThreads;
  static_assert(kMostColumns == 64 * kWarp, "a lane has 64 bits of the bitmap");

  alignas(16) uint32_t best[kGroups];
  alignas(16) uint32_t keys[kMostCandidates];  // 0 behind the last one
  int32_t columns[kMostCandidates];
  uint64_t chosen[kWarp];  // a bit a column
  alignas(16) uint32_t lowest[kThreads / kWarp];
  int32_t reaching;  // columns that reach it

  // Ahead of a choice.
  __device__ void clear() {
    if (threadIdx.x < kMostCandidates) keys[threadIdx.x] = 0;
    if (threadIdx.x < kWarp) chosen[threadIdx.x] = 0;
    if (threadIdx.x == 0) reaching = 0;
  }
};

// count += a > b, by one instruction behind the comparison: for `count += a > b` ptxas writes two.
__device__ __forceinline__ void count_above(int32_t& count, uint32_t a, uint32_t b) {
  asm("{.reg .pred p; setp.gt.u32 p, %1, %2; @p add.s32 %0, %0, 1;}" : "+r"(count) : "r"(a), "r"(b));
}

// How many keys of `count` vectors, every other one from `from` on, are above `own`. kAtOnce vectors are asked for at a
// time, so that up to kAtOnce - 1 more are read, and what they bring is counted side by side.
template <int32_t kAtOnce>
__device__ __forceinline__ int32_t count_above(const uint4* from, int32_t count, uint32_t own) {
  int32_t counts[4] = {};
#pragma unroll 1
  for (int32_t i = 0; i < count; i += kAtOnce) {
    uint4 keys[kAtOnce];
#pragma unroll
    for (int32_t k = 0; k < kAtOnce; ++k) keys[k] = from[2 * (i + k)];
#pragma unroll
    for (int32_t k = 0; k < kAtOnce; ++k) {
      count_above(counts[0], keys[k].x, own);
      count_above(counts[1], keys[k].y, own);
      count_above(counts[2], keys[k].z, own);
      count_above(counts[3], keys[k].w, own);
    }
  }
  return counts[0] + counts[1] + counts[2] + counts[3];
}

// *to = value where `is`, without a branch, for each of which ptxas would write three instructions more.
__device__ __forceinline__ void store_where(bool is, void* to, uint32_t value) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.shared.u32 [%1], %2;}" ::"r"(static_cast<uint32_t>(is)),
               "r"(shared_address(to)), "r"(value)
               : "memory");
}

// Of both threads of a pair.
__device__ __forceinline__ int32_t pair_sum(int32_t value) { return value + __shfl_xor_sync(~0u, value, 1); }

// f(position, column) for each of the `wanted` columns of the highest key(column), its position among those. Returns
// false, and calls nothing, where more columns come into question than there is room for, or where equal keys do of
// which some are not wanted. All threads call, behind a barrier behind clear().
template <class BestFew, class Key, class F>
__device__ bool for_each_of_few(BestFew& shared, int32_t columns, int32_t wanted, const Key& key, const F& f) {
  constexpr int kGroups = BestFew::kGroups;
  const int32_t lane = threadIdx.x % kWarp, pair = threadIdx.x / 2, half = threadIdx.x % 2;
  // Threads of a warp read from different banks.
  const auto column_of = [&](int32_t i) { return (pair + 16 * half) % kGroups + (2 * i + half) * kGroups; };
  const auto every_other = [&](const uint32_t* keys) { return reinterpret_cast<const uint4*>(keys) + half; };
  uint32_t keys[BestFew::kHeld], best = 0;
#pragma unroll
  for (int32_t i = 0; i < BestFew::kHeld; ++i) {
    keys[i] = column_of(i) < columns ? max(key(column_of(i)), 1u) : 0;  // 0: there is none
    best = max(best, keys[i]);
  }
  best = max(best, __shfl_xor_sync(~0u, best, 1));
  if (half == 0) shared.best[pair] = best;
  __syncthreads();

  const int32_t better = pair_sum(count_above<8>(every_other(shared.best), kGroups / 8, best));
  const uint32_t lowest = __reduce_min_sync(~0u, better < wanted ? best : ~0u);
  if (lane == 0) shared.lowest[threadIdx.x / kWarp] = lowest;
  __syncthreads();

  uint32_t floor = ~0u;
#pragma unroll
  for (int32_t warp = 0; warp < BestFew::kThreads / kWarp; ++warp) floor = min(floor, shared.lowest[warp]);
  floor = max(floor, 1u);
  uint32_t lanes[BestFew::kHeld];  // of which key i reaches it
  int32_t in_warp = 0;
#pragma unroll
  for (int32_t i = 0; i < BestFew::kHeld; ++i) {
    lanes[i] = __ballot_sync(~0u, keys[i] >= floor);
    in_warp += __popc(lanes[i]);
  }
  int32_t at = lane == 0 ? atomicAdd(&shared.reaching, in_warp) : 0;
  at = __shfl_sync(~0u, at, 0);
  const uint32_t below = (1u << lane) - 1;
#pragma unroll
  for (int32_t i = 0; i < BestFew::kHeld; ++i) {
    const int32_t place = at + __popc(lanes[i] & below);
    const bool fits = keys[i] >= floor && place < BestFew::kMostCandidates;
    store_where(fits, &shared.columns[place], column_of(i));
    store_where(fits, &shared.keys[place], keys[i]);
    at += __popc(lanes[i]);
  }
  __syncthreads();

  const int32_t candidates = shared.reaching;
  if (candidates > BestFew::kMostCandidates) return false;
  const int32_t above = pair_sum(count_above<4>(every_other(shared.keys), ceil_div(candidates, 8), shared.keys[pair]));
  const bool chosen = above < wanted && pair < candidates && half == 0;
  const int32_t column = chosen ? shared.columns[pair] : 0;
  if (chosen) atomicOr(reinterpret_cast<uint32_t*>(shared.chosen) + column / 32, 1u << column % 32);
  __syncthreads();

  const uint64_t bits = shared.chosen[lane];
  const int32_t to_lane = warp_scan(__popcll(bits));
  if (__shfl_sync(~0u, to_lane, kWarp - 1) != wanted) return false;
  const int32_t before = __shfl_sync(~0u, to_lane - __popcll(bits), column / 64);
  const uint64_t word = __shfl_sync(~0u, bits, column / 64);
  if (chosen) f(before + __popcll(word & ((uint64_t{1} << column % 64) - 1)), column);
  return true;
}

}  // namespace flashcore
