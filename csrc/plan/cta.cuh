// The threads of a CTA as a team: loops, prefix sums and ranks over n items, in an order that never changes.
#pragma once

#include <bit>
#include <cstdint>

namespace flashcore {

constexpr int kWarp = 32;

template <class T>
__device__ T shuffle_up(T value, int32_t delta) {
  const T below = std::bit_cast<T>(__shfl_up_sync(~0u, std::bit_cast<int64_t>(value), delta));
  return threadIdx.x % kWarp >= delta ? below : T{};
}

template <class T>
__device__ T shuffle(T value, int32_t lane) {
  return std::bit_cast<T>(__shfl_sync(~0u, std::bit_cast<int64_t>(value), lane));
}

// Sum over the lanes up to this one.
template <class T>
__device__ T warp_scan(T value) {
  for (int32_t delta = 1; delta < kWarp; delta *= 2) value = shuffle_up(value, delta) + value;
  return value;
}

// The threads of one CTA; see build.h for what a team offers. All threads call together.
template <int kThreads>
struct Cta {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "scan sums up the warps in one warp");
  static constexpr int kWarps = kThreads / kWarp;
  int64_t* warp_sums;  // [kWarp] in shared memory

  template <class F>
  __device__ void for_each(int32_t n, F f) {
    for (int32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  template <class T, class Value, class F>
  __device__ T scan(int32_t n, Value value, F f) {
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    T before{};
    for (int32_t base = 0; base < n; base += kThreads) {
      const int32_t i = base + threadIdx.x;
      const T through = warp_scan(i < n ? value(i) : T{});
      if (lane == kWarp - 1) warp_sums[warp] = std::bit_cast<int64_t>(through);
      __syncthreads();
      const T warps = warp_scan(lane < kWarps ? std::bit_cast<T>(warp_sums[lane]) : T{});
      const T warps_before = shuffle_up(warps, 1);
      const T own = before + shuffle(warps_before, warp) + shuffle_up(through, 1);
      if (i < n) f(i, own);
      before = before + shuffle(warps, kWarp - 1);
      __syncthreads();
    }
    return before;
  }

  // One warp a group takes the items in order, 32 at a time.
  template <class Key, class F>
  __device__ void rank(int32_t n, int32_t groups, Key key, int32_t* counter, F f) {
    const int32_t lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
    for (int32_t base = 0; base < n && group < groups; base += kWarp) {
      const int32_t i = base + lane;
      const int32_t k = i < n ? key(i, group) : -1;
      const uint32_t same = __match_any_sync(~0u, k);
      const int32_t leader = __ffs(same) - 1;
      int32_t start = 0;
      if (k >= 0 && lane == leader) {
        start = counter[k];
        counter[k] = start + __popc(same);
      }
      start = __shfl_sync(~0u, start, leader);
      if (k >= 0) f(i, group, start + __popc(same & ((1u << lane) - 1)));
      __syncwarp();  // the next leader of this key may be another lane
    }
    __syncthreads();
  }
};

}  // namespace flashcore
