// The threshold of a choice: how high a column's key must be to be among the best ones that there is room for.
//
// A radix select over the range that the keys really span: each round counts them in buckets and narrows the range to
// one bucket, until all or one key of it is wanted (two rounds as a rule, three at most). Columns are any object with
// for_each(f), which calls f(key, column) for each column of the thread's, the columns of all threads being a
// partition.
#pragma once

#include <cuda_runtime.h>

#include "arithmetic.h"
#include "plan/cta.cuh"
#include "summary/rules.h"

namespace flashcore {

// A column is chosen if its key is higher, or if it is among the first `ties` of just this key.
struct Threshold {
  uint32_t key;
  int32_t ties;
};

// How many columns stand before one in the list: those of a higher key, and those of just the threshold's.
struct Places {
  int32_t better, ties;

  __device__ static Places of(uint32_t key, const Threshold& threshold) {
    return {key > threshold.key, key == threshold.key};
  }
  __device__ Places operator+(const Places& other) const { return {better + other.better, ties + other.ties}; }
  // Of this column, if `own` is it.
  __device__ bool is_chosen(const Places& own, const Threshold& threshold) const {
    return own.better || (own.ties && ties < threshold.ties);
  }
  __device__ int32_t in_list(const Threshold& threshold) const { return better + min(ties, threshold.ties); }
};

// What the threads of a CTA count in.
template <int kThreads_, int kBucketBits_>
struct Counts {
  static constexpr int kThreads = kThreads_, kWarps = kThreads / kWarp;
  static constexpr int kBucketBits = kBucketBits_, kBuckets = 1 << kBucketBits;

  int32_t counts[kBuckets];  // 0 but during a round
  uint32_t lowest[kWarps], highest[kWarps];
  int32_t sums[kWarps];
  Places places[kWarps];
  struct {
    int32_t bucket, wanted, inside;
  } found;

  __device__ void clear() {
    for (int32_t i = threadIdx.x; i < kBuckets; i += kThreads) counts[i] = 0;
  }
};

__device__ inline int32_t warp_sum(int32_t value) { return __reduce_add_sync(~0u, value); }
__device__ inline Places warp_sum(const Places& value) { return {warp_sum(value.better), warp_sum(value.ties)}; }

// Sum over the threads before this one; all threads call. `sums` is free again behind the next __syncthreads().
template <class T>
__device__ T sum_before(T value, T* sums) {
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T through = warp_scan(value);
  if (lane == kWarp - 1) sums[warp] = through;
  __syncthreads();
  return warp_sum(lane < warp ? sums[lane] : T{}) + shuffle_up(through, 1);
}

// The lowest and the highest key.
template <class Columns, class Counts>
__device__ uint2 key_range(const Columns& columns, Counts& shared) {
  uint32_t lowest = ~0u, highest = 0;
  columns.for_each([&](uint32_t key, int32_t) {
    lowest = min(lowest, key);
    highest = max(highest, key);
  });
  lowest = __reduce_min_sync(~0u, lowest);
  highest = __reduce_max_sync(~0u, highest);
  if (threadIdx.x % kWarp == 0) {
    shared.lowest[threadIdx.x / kWarp] = lowest;
    shared.highest[threadIdx.x / kWarp] = highest;
  }
  __syncthreads();
  const int32_t warp = threadIdx.x % Counts::kWarps;
  return {__reduce_min_sync(~0u, shared.lowest[warp]), __reduce_max_sync(~0u, shared.highest[warp])};
}

// The columns of the highest keys whose sizes (of 1 at least, equal for equal keys) add up to `wanted`.
template <class Columns, class Counts, class Size>
__device__ Threshold find_threshold(const Columns& columns, uint2 range, int32_t wanted, Counts& shared, Size size) {
  uint32_t low = range.x, span = range.y - range.x;  // keys low .. low + span are left
  while (true) {
    const int32_t shift = max(kWarp - __clz(span) - Counts::kBucketBits, 0);
    columns.for_each([&](uint32_t key, int32_t) {
      const uint32_t offset = key - low;
      if (offset <= span) atomicAdd(shared.counts + (offset >> shift), size(key));
    });
    __syncthreads();
    // The bucket, counted from the top, in which the wanted page is; a thread has kEach of them.
    constexpr int32_t kEach = Counts::kBuckets / Counts::kThreads;
    const int32_t top = Counts::kBuckets - 1 - static_cast<int32_t>(threadIdx.x) * kEach;
    int32_t inside[kEach], own = 0;
#pragma unroll
    for (int32_t i = 0; i < kEach; ++i) {
      own += inside[i] = shared.counts[top - i];
      shared.counts[top - i] = 0;
    }
    int32_t above = sum_before(own, shared.sums);
#pragma unroll
    for (int32_t i = 0; i < kEach; ++i) {
      if (above < wanted && wanted <= above + inside[i]) shared.found = {top - i, wanted - above, inside[i]};
      above += inside[i];
    }
    __syncthreads();
    low += static_cast<uint32_t>(shared.found.bucket) << shift;
    span = (1u << shift) - 1;
    wanted = shared.found.wanted;
    if (wanted == shared.found.inside) return {low, INT32_MAX};  // the whole bucket
    if (shift == 0) return {low, ceil_div(wanted, size(low))};
  }
}

// f(position, column) for each chosen column, its position among those; a thread's columns are neighbours. Returns, in
// the last thread, how many are chosen.
template <class Columns, class Counts, class F>
__device__ int32_t for_each_chosen(const Columns& columns, const Threshold& threshold, Counts& shared, F f) {
  Places before{};
  columns.for_each([&](uint32_t key, int32_t) { before = before + Places::of(key, threshold); });
  before = sum_before(before, shared.places);
  columns.for_each([&](uint32_t key, int32_t i) {
    const Places own = Places::of(key, threshold);
    if (before.is_chosen(own, threshold)) f(before.in_list(threshold), i);
    before = before + own;
  });
  return before.in_list(threshold);
}

}  // namespace flashcore
