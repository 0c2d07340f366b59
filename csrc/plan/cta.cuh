// The threads of a CTA, or the lanes of a warp, as a team: loops, prefix sums and searches over n items whose results
// do not depend on how the items are dealt. See schedule.h and share.h for what a team offers.
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

// Sum over the lanes up to this one.
template <class T>
__device__ T warp_scan(T value) {
#pragma unroll
  for (int32_t delta = 1; delta < kWarp; delta *= 2) value = shuffle_up(value, delta) + value;
  return value;
}

// The threads of one CTA. All of them call together.
template <int kThreads, int kCopyBytes = 16>
struct Cta {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "scan sums up the warps in one warp");
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kSumBytes = 24;  // of the largest T that is summed
  struct Shared {
    alignas(16) unsigned char sums[kWarps * kSumBytes];
    int32_t firsts[2][kWarps];
    alignas(16) unsigned char copies[kCopyBytes];
  };
  Shared& shared;
  int32_t used = 0;  // bytes of `copies`
  int32_t turn = 0;  // of the two `firsts`: slower warps still read the other one

  template <class F>
  __device__ void for_each(int32_t n, F f) {
    for (int32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  template <class T, class Value, class F>
  __device__ T scan(int32_t n, Value value, F f) {
    static_assert(sizeof(T) <= kSumBytes);
    T* sums = reinterpret_cast<T*>(shared.sums);
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    T before{};
    for (int32_t base = 0; base < n; base += kThreads) {
      const int32_t i = base + threadIdx.x;
      T through{};
      if (i - lane < n) through = warp_scan(i < n ? value(i) : T{});
      if (lane == kWarp - 1) sums[warp] = through;
      __syncthreads();
      if (warp == 0) {
        const T warps = warp_scan(lane < kWarps ? sums[lane] : T{});
        if (lane < kWarps) sums[lane] = warps;
      }
      __syncthreads();
      const T own = (warp > 0 ? before + sums[warp - 1] : before) + shuffle_up(through, 1);
      if (i < n) f(i, own);
      before = before + sums[kWarps - 1];
      __syncthreads();
    }
    return before;
  }

  // Shared memory for n values as long as there is room.
  template <class T>
  __device__ T* beside(T* values, int32_t n) {
    const int32_t bytes = (n * static_cast<int32_t>(sizeof(T)) + 15) / 16 * 16;
    if (bytes > kCopyBytes - used) return values;
    T* copy = reinterpret_cast<T*>(shared.copies + used);
    used += bytes;
    return copy;
  }

  // kUnroll items of a thread are looked at side by side, so that their loads are on the way together.
  template <int kUnroll, class F>
  __device__ int32_t first(int32_t begin, int32_t end, F f) {
    for (int32_t base = begin; base < end; base += kThreads * kUnroll) {
      int32_t found = end;
#pragma unroll
      for (int32_t k = 0; k < kUnroll; ++k) {
        const int32_t i = min(base + k * kThreads + static_cast<int32_t>(threadIdx.x), end - 1);
        found = f(i) ? min(found, i) : found;
      }
      int32_t* firsts = shared.firsts[turn ^= 1];
      found = __reduce_min_sync(~0u, found);
      if (threadIdx.x % kWarp == 0) firsts[threadIdx.x / kWarp] = found;
      __syncthreads();
#pragma unroll
      for (int32_t warp = 0; warp < kWarps; ++warp) found = min(found, firsts[warp]);
      if (found < end) return found;
    }
    return end;
  }
};

}  // namespace flashcore
