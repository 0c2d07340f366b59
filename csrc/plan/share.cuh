// Shared prefixes on the device: what share.h does for a request, by a CTA or a warp for each of them.
//
// What all of a CTA read of all requests stands in its shared memory (kInShared), as long as there is room.
#pragma once

#include "device/dependent_launch.cuh"
#include "plan/cta.cuh"
#include "plan/share.h"

namespace flashcore {

constexpr int kTraceThreads = 256;
constexpr int kWalkThreads = 512;

// The threads of a CTA in search of something.
struct TraceTeam {
  static constexpr int kWarps = kTraceThreads / kWarp;
  struct Shared {
    int32_t firsts[2][kWarps];
  };
  Shared& shared;
  int32_t turn = 0;  // of the two `firsts`: slower warps still read the other one

  __device__ bool leads() const { return threadIdx.x == 0; }

  // kUnroll items of a thread are looked at side by side, so that their loads are on the way together.
  template <int kUnroll, class F>
  __device__ int32_t first(int32_t begin, int32_t end, F f) {
    for (int32_t base = begin; base < end; base += kTraceThreads * kUnroll) {
      int32_t found = end;
#pragma unroll
      for (int32_t k = 0; k < kUnroll; ++k) {
        const int32_t i = min(base + k * kTraceThreads + static_cast<int32_t>(threadIdx.x), end - 1);
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

template <bool kInShared>
__global__ void __launch_bounds__(kTraceThreads, 4) trace_kernel(PlanJob p, Found found) {
  extern __shared__ int4 memory[];
  __shared__ TraceTeam::Shared shared;
  allow_dependents();
  if (!p.beside) wait_for_primary();
  TraceTeam team{shared};
  const int32_t r = blockIdx.x;
  const bool fits = batch_fits(p);
  if constexpr (kInShared) {
    constexpr int kUnroll = 2;
    Shareable* all = reinterpret_cast<Shareable*>(memory);  // [batch]
#pragma unroll 1
    for (int32_t base = threadIdx.x; base <= r; base += kUnroll * kTraceThreads) {
      Request requests[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) requests[k] = request_of(p, min(base + k * kTraceThreads, r));
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (base + k * kTraceThreads <= r) all[base + k * kTraceThreads] = shareable_of(p, requests[k], fits);
      }
    }
    __syncthreads();
    trace_path(p, found, team, r, [&](int32_t i) { return all[i]; });
  } else {
    trace_path(p, found, team, r, [&](int32_t i) { return shareable_of(p, request_of(p, i), fits); });
  }
  if (p.beside) wait_for_primary();
}

__device__ inline Edge over_lanes(const Edge& sum) {
  return {__reduce_add_sync(~0u, sum.members), __reduce_add_sync(~0u, sum.rank), __reduce_min_sync(~0u, sum.end)};
}
__device__ inline Place over_lanes(const Place& sum) {
  return {__reduce_add_sync(~0u, sum.before), __reduce_add_sync(~0u, sum.rank), __reduce_max_sync(~0u, sum.next)};
}
__device__ inline ScoredSum over_lanes(const ScoredSum& sum) {
  return {__reduce_add_sync(~0u, sum.stretches), __reduce_add_sync(~0u, sum.shared),
          __reduce_add_sync(~0u, sum.columns)};
}

// The lanes of a warp.
struct WalkTeam {
  __device__ bool leads() const { return threadIdx.x % kWarp == 0; }

  template <class Value>
  __device__ auto sum(int32_t n, Value value) const {
    using Sum = decltype(value(0));
    constexpr int kUnroll = 8;  // items of a lane that are looked at side by side
    Sum sum;
#pragma unroll 1
    for (int32_t base = threadIdx.x % kWarp; base < n; base += kUnroll * kWarp) {
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) sum = sum + (base + k * kWarp < n ? value(base + k * kWarp) : Sum{});
    }
    return over_lanes(sum);
  }
};

// Bytes of shared memory of a walk.
inline int64_t walk_bytes(const PlanJob& p) {
  return kMaxLevels * p.batch * static_cast<int64_t>((shares_scores(p) ? 2 : 1) * sizeof(Path) + sizeof(bool));
}

template <bool kInShared>
__global__ void __launch_bounds__(kWalkThreads) walk_kernel(PlanJob p, Found found) {
  extern __shared__ int4 memory[];
  allow_dependents();
  const int32_t r = (blockIdx.x * kWalkThreads + threadIdx.x) / kWarp;
  if constexpr (kInShared) {
    Path* paths = reinterpret_cast<Path*>(memory);                                               // [kMaxLevels, batch]
    Path* scored = paths + kMaxLevels * p.batch;                                                 // [kMaxLevels, batch]
    bool* followed = reinterpret_cast<bool*>(scored + shares_scores(p) * kMaxLevels * p.batch);  // [kMaxLevels, batch]
    for (int32_t i = threadIdx.x; i < kMaxLevels * p.batch; i += kWalkThreads) followed[i] = false;
    __syncthreads();
    wait_for_primary();
#pragma unroll 2
    for (int32_t i = threadIdx.x; i < p.batch; i += kWalkThreads) {
      Path its[kMaxLevels];
#pragma unroll
      for (int round = 0; round < kMaxLevels; ++round) its[round] = found.paths[i * kMaxLevels + round];
#pragma unroll
      for (int round = 0; round < kMaxLevels; ++round) {
        const auto [owner, end] = paths[round * p.batch + i] = its[round];
        if (owner >= 0 && owner != i) followed[round * p.batch + owner] = true;
      }
      if (!shares_scores(p)) continue;
#pragma unroll
      for (int round = 0; round < kMaxLevels; ++round) {
        scored[round * p.batch + i] = found.scored[i * kMaxLevels + round];
      }
    }
    __syncthreads();
    if (r >= p.batch) return;
    walk(
        p, found, WalkTeam{}, r, [&](int32_t round, int32_t i) { return paths[round * p.batch + i]; },
        [&](int32_t round, int32_t i) { return followed[round * p.batch + i]; });
    if (!shares_scores(p)) return;
    place_stretches(p, WalkTeam{}, r, [&](int32_t round, int32_t i) { return scored[round * p.batch + i]; });
  } else {
    wait_for_primary();
    if (r >= p.batch) return;
    walk(
        p, found, WalkTeam{}, r, [&](int32_t round, int32_t i) { return found.paths[i * kMaxLevels + round]; },
        [](int32_t, int32_t) { return true; });
    if (!shares_scores(p)) return;
    place_stretches(p, WalkTeam{}, r, [&](int32_t round, int32_t i) { return found.scored[i * kMaxLevels + round]; });
  }
}

}  // namespace flashcore
