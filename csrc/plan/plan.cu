// The plan on the device, without a word to the host: up to four launches, each small.
//
//   count_first     1 CTA                  owner and count of every request's first page; without sharing it ends here
//   count_pages     (requests, chunks)     the other full columns of requests whose first page is shared
//   walk            (requests)             down the columns of one request: nodes of the prefix tree (share.h)
//   build           1 + requests CTAs      CTA 0 makes the plan (build.h); the others put owners and counts back to
//   zero
//
// Integer atomics whose order does not matter (max, add) are all there is between CTAs, so a plan is the same in every
// run and the same as the CPU's.
#include <cuda_runtime.h>

#include <algorithm>

#include "plan/build.h"
#include "plan/cta.cuh"

namespace flashcore {

namespace {

constexpr int kCountThreads = 256;
constexpr int kWalkThreads = 512;
constexpr int kBuildThreads = 1024;

// ---------------------------------------------------------------------------------------------------------------------
// Counting pages
// ---------------------------------------------------------------------------------------------------------------------

// The page in a column, or -1 for an id that is not of the pool.
__device__ int32_t page_at(const PlanParams& p, const Request& request, int32_t column) {
  const int32_t page = p.plan.kv_indices[request.page_begin + column];
  return page >= 0 && page < p.num_pages ? page : -1;
}

__device__ void claim(const PlanParams& p, const Scratch& s, int32_t r, int32_t page) {
  if (page < 0) return;
  atomicMax(s.owner + page, p.batch - r);
  atomicAdd(s.count + page, 1);
}

__device__ int32_t first_page(const PlanParams& p, int32_t r) {
  const Request request = request_of(p, r);
  return shareable_columns(p, request) > 0 ? page_at(p, request, 0) : -1;
}

__global__ void __launch_bounds__(kBuildThreads) count_first_kernel(PlanParams p) {
  if (!batch_fits(p)) return;
  const Scratch s = scratch_of(p);
  for (int32_t r = threadIdx.x; r < p.batch; r += kBuildThreads) claim(p, s, r, first_page(p, r));
  __syncthreads();
  for (int32_t r = threadIdx.x; r < p.batch; r += kBuildThreads) {
    const int32_t page = first_page(p, r);
    s.scattered[r] = page >= 0 && __ldcg(s.count + page) > 1;  // from L2, where the atomics were done
  }
}

__global__ void __launch_bounds__(kCountThreads) count_pages_kernel(PlanParams p) {
  const Scratch s = scratch_of(p);
  const int32_t r = blockIdx.x;
  if (!batch_fits(p) || !s.scattered[r]) return;
  const Request request = request_of(p, r);
  const int32_t columns = shareable_columns(p, request);
  for (int32_t c = 1 + blockIdx.y * kCountThreads + threadIdx.x; c < columns; c += gridDim.y * kCountThreads) {
    claim(p, s, r, page_at(p, request, c));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Walking: all threads look columns up, one warp goes from edge to edge
// ---------------------------------------------------------------------------------------------------------------------

struct WarpLanes {
  __device__ int32_t index() const { return threadIdx.x % kWarp; }
  __device__ int32_t count() const { return kWarp; }
  __device__ bool first() const { return index() == 0; }
  __device__ bool all(bool value) const { return __all_sync(~0u, value); }
};

// Takes the walk over 32 columns, of which each lane has one. False: it is over.
__device__ bool step(Walk<WarpLanes>& walk, int32_t first_column, Edge edge) {
  Edge before{__shfl_up_sync(~0u, edge.owner, 1), __shfl_up_sync(~0u, edge.count, 1)};
  if (walk.lanes.first()) before = walk.edge;
  uint32_t changes = __ballot_sync(~0u, edge.owner < 0 || !(edge == before));
  for (; changes != 0; changes &= changes - 1) {
    const int32_t lane = __ffs(changes) - 1;
    const Edge next{__shfl_sync(~0u, edge.owner, lane), __shfl_sync(~0u, edge.count, lane)};
    const bool going = walk.close(first_column + lane);
    if (!going || next.owner < 0) return false;
    walk.open(first_column + lane, next);
  }
  return true;
}

__global__ void __launch_bounds__(kWalkThreads) walk_kernel(PlanParams p) {
  __shared__ Edge edges[kWalkThreads];
  __shared__ bool going;
  if (!batch_fits(p)) return;
  const Scratch s = scratch_of(p);
  const int32_t r = blockIdx.x;
  const WarpLanes lanes;
  const Request request = request_of(p, r);
  const int32_t columns = s.scattered[r] ? shareable_columns(p, request) : 0;
  Walk<WarpLanes> walk{p, s, lanes, r, request};
  const bool walks = threadIdx.x < kWarp;
  if (threadIdx.x == 0) going = columns > 0;
  __syncthreads();
  for (int32_t base = 0; going; base += kWalkThreads) {
    const int32_t column = base + threadIdx.x;
    edges[threadIdx.x] = column < columns ? edge_of(p, s, request, column) : Edge{-1, 0};
    __syncthreads();  // also: everyone has seen `going`
    if (walks) {
      bool more = true;
      for (int32_t i = 0; i < kWalkThreads && more; i += kWarp) more = step(walk, base + i, edges[i + lanes.index()]);
      if (lanes.first()) going = more;
    }
    __syncthreads();
  }
  if (walks) walk.finish();
}

// ---------------------------------------------------------------------------------------------------------------------
// Building
// ---------------------------------------------------------------------------------------------------------------------

static_assert(kMaxLevels <= kBuildThreads / kWarp, "Cta::rank has a warp for each level");

__device__ void forget_pages(const PlanParams& p, int32_t r) {
  if (!batch_fits(p)) return;
  const Scratch s = scratch_of(p);
  const Request request = request_of(p, r);
  const int32_t columns = shareable_columns(p, request);
  const int32_t counted = s.scattered[r] ? columns : min(columns, 1);
  for (int32_t c = threadIdx.x; c < counted; c += kBuildThreads) {
    const int32_t page = page_at(p, request, c);
    if (page >= 0) s.owner[page] = s.count[page] = 0;
  }
}

__global__ void __launch_bounds__(kBuildThreads) build_kernel(PlanParams p) {
  __shared__ int64_t warp_sums[kWarp];
  if (blockIdx.x > 0) return forget_pages(p, blockIdx.x - 1);
  Cta<kBuildThreads> cta{warp_sums};
  Builder<Cta<kBuildThreads>>(p, cta).build();
}

}  // namespace

int run_plan_cuda(const PlanParams& p) {
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (scratch_of(p).size > p.scratch_size) return cudaErrorInvalidValue;
  const bool share = shares_pages(p);
  if (share) {
    count_first_kernel<<<1, kBuildThreads, 0, stream>>>(p);
    const dim3 chunks(p.batch, std::clamp(1024 / p.batch, 4, 64));
    count_pages_kernel<<<chunks, kCountThreads, 0, stream>>>(p);
    walk_kernel<<<p.batch, kWalkThreads, 0, stream>>>(p);
  }
  build_kernel<<<1 + (share ? p.batch : 0), kBuildThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flashcore
