// The threads of a CTA, or the lanes of a warp, as a team: prefix sums over n items whose results do not depend on how
// the items are dealt. See build.h for what a team offers.
#pragma once

#include <bit>
#include <cstdint>

namespace flashcore {

constexpr int kWarp = 32;

template <class T>
struct Words {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  static constexpr int kCount = sizeof(T) / sizeof(uint32_t);
  uint32_t word[kCount];
};

// Of the lane `delta` below; T{} where there is none.
template <class T>
__device__ T shuffle_up(T value, int32_t delta) {
  auto words = std::bit_cast<Words<T>>(value);
#pragma unroll
  for (uint32_t& word : words.word) word = __shfl_up_sync(~0u, word, delta);
  return threadIdx.x % kWarp >= delta ? std::bit_cast<T>(words) : T{};
}

template <class T>
__device__ T shuffle(T value, int32_t lane) {
  auto words = std::bit_cast<Words<T>>(value);
#pragma unroll
  for (uint32_t& word : words.word) word = __shfl_sync(~0u, word, lane);
  return std::bit_cast<T>(words);
}

// Sum over the lanes up to this one.
template <class T>
__device__ T warp_scan(T value) {
#pragma unroll
  for (int32_t delta = 1; delta < kWarp; delta *= 2) value = shuffle_up(value, delta) + value;
  return value;
}

// The same for an integer, by shuffles that say themselves whether there is a lane below: no comparison for each.
__device__ inline int32_t warp_scan(int32_t value) {
#pragma unroll
  for (int32_t delta = 1; delta < kWarp; delta *= 2) {
    asm("{.reg .pred p; .reg .s32 below; shfl.sync.up.b32 below|p, %0, %1, 0, -1; @p add.s32 %0, %0, below;}"
        : "+r"(value)
        : "r"(delta));
  }
  return value;
}

// The threads of one CTA, whole warps of them. All of them call together.
struct Cta {
  static constexpr int kSumBytes = 32;  // of the largest T that is summed
  struct Shared {
    alignas(16) unsigned char sums[2][kWarp * kSumBytes];
  };
  Shared& shared;
  int32_t turn = 0;  // of the two `sums`: slower warps still read the other one

  template <class T, class Value, class F>
  __device__ T scan(int32_t n, Value value, F f) {
    static_assert(sizeof(T) <= kSumBytes);
    const int32_t threads = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    T before{};
    for (int32_t base = 0; base < n; base += threads) {
      T* sums = reinterpret_cast<T*>(shared.sums[turn ^= 1]);
      const int32_t i = base + threadIdx.x;
      T through{};
      if (i - lane < n) through = warp_scan(i < n ? value(i) : T{});
      if (lane == kWarp - 1) sums[warp] = through;
      __syncthreads();
      // Every warp sums up the warps: waiting for one that does takes longer.
      const T warps = warp_scan(lane < threads / kWarp ? sums[lane] : T{});
      const T lower = shuffle(warps, max(warp - 1, 0));
      const T own = before + (warp > 0 ? lower : T{}) + shuffle_up(through, 1);
      if (i < n) f(i, own);
      before = before + shuffle(warps, kWarp - 1);
    }
    __syncthreads();
    return before;
  }
};

}  // namespace flashcore
