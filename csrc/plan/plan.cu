// The plan on the device, without a word to the host: two launches, four with sharing.
//
//   trace    (requests)       a CTA a request: its path down the prefix tree (share.h)
//   walk     (requests / 4)   a warp a request: nodes of the prefix tree
//   build    1 CTA            rows, cuts, CTA ranges: what needs sums (build.h)
//   write    4 CTAs an SM     tokens and tiles, a thread an item, a CTA one kind of them (write.h)
//
// Each launch begins while the one before it ends (dependent_launch.cuh). There are no atomics, so a plan is the same
// in every run and the same as the CPU's.
#include <cuda_runtime.h>

#include "device/dependent_launch.cuh"
#include "plan/cta.cuh"
#include "plan/write.h"

namespace flashcore {

namespace {

constexpr int kTraceThreads = 256;
constexpr int kWalkThreads = 128;
constexpr int kBuildThreads = 1024;
constexpr int kBuildCopyBytes = 40 << 10;
constexpr int kWriteThreads = 256;
constexpr int kWriteKinds = 4;
constexpr int kWriteCtas = kWriteKinds * 132;

struct TraceTeam : Cta<kTraceThreads> {
  __device__ bool leads() const { return threadIdx.x == 0; }
};

struct WalkTeam {
  __device__ bool leads() const { return threadIdx.x % kWarp == 0; }

  template <class Value>
  __device__ Edge sum(int32_t n, Value value) const {
    Edge sum;
#pragma unroll 8
    for (int32_t i = threadIdx.x % kWarp; i < n; i += kWarp) sum = sum + value(i);
    return {__reduce_add_sync(~0u, sum.members), __reduce_add_sync(~0u, sum.rank), __reduce_min_sync(~0u, sum.end)};
  }
};

__global__ void __launch_bounds__(kTraceThreads, 4) trace_kernel(PlanJob p, Scratch s) {
  __shared__ TraceTeam::Shared shared;
  allow_dependents();
  wait_for_primary();
  TraceTeam team{{shared}};
  trace_path(p, s, team, blockIdx.x);
}

__global__ void __launch_bounds__(kWalkThreads) walk_kernel(PlanJob p, Scratch s) {
  allow_dependents();
  wait_for_primary();
  const int32_t r = (blockIdx.x * kWalkThreads + threadIdx.x) / kWarp;
  if (r < p.batch) walk(p, s, WalkTeam{}, r);
}

__global__ void __launch_bounds__(kBuildThreads) build_kernel(PlanJob p, Scratch s) {
  using Team = Cta<kBuildThreads, kBuildCopyBytes>;
  __shared__ Team::Shared shared;
  allow_dependents();
  wait_for_primary();
  Team team{shared};
  Builder<Team>(p, s, team).build();
}

__global__ void __launch_bounds__(kWriteThreads) write_kernel(PlanJob p, Scratch s) {
  allow_dependents();
  wait_for_primary();
  const Writer writer(p, s);
  // Kinds side by side: each is a chain of loads, and the chains are what takes the time.
  const int32_t kind = blockIdx.x % kWriteKinds, first = blockIdx.x / kWriteKinds * kWriteThreads + threadIdx.x;
  const auto each = [&](int32_t n, auto write) {
    for (int32_t i = first; i < n; i += kWriteCtas / kWriteKinds * kWriteThreads) write(i);
  };
  if (kind == 0) each(writer.num_tokens(), [&](int32_t t) { writer.write_token(t); });
  if (kind == 1) each(writer.num_uncut(), [&](int32_t uncut) { writer.write_uncut(uncut); });
  if (kind == 2) each(writer.num_cuts(), [&](int32_t cut) { writer.write_cut(cut); });
  if (kind == 3) each(writer.num_listed(), [&](int32_t i) { writer.write_listed(i); });
}

}  // namespace

int run_plan_cuda(const PlanParams& params) {
  const PlanJob p(params);
  const Scratch s = scratch_of(p);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (s.size > p.scratch_size) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  const auto launch = [&](auto kernel, int ctas, int threads) {
    if (error == cudaSuccess) error = launch_dependent(kernel, ctas, threads, stream, p, s);
  };
  if (shares_pages(p)) {
    launch(trace_kernel, p.batch, kTraceThreads);
    launch(walk_kernel, ceil_div(p.batch, kWalkThreads / kWarp), kWalkThreads);
  }
  launch(build_kernel, 1, kBuildThreads);
  launch(write_kernel, kWriteCtas, kWriteThreads);
  return error;
}

}  // namespace flashcore
