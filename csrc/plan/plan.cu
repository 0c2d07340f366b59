// The plan on the device, without a word to the host: one launch, three with sharing.
//
//   trace    (requests)       a CTA a request: its path down the prefix tree (share.cuh)
//   walk     (requests / 16)  a warp a request: nodes of the prefix tree, stretches that are scored once (share.cuh)
//   plan     16 CTAs          rows, cuts, CTA ranges: what needs sums (build.h); tokens and tiles (write.h)
//
// Each launch begins while the one before it ends (dependent_launch.cuh), a second plan of the same page table beside
// the first: plan lets it begin behind its own wait, for the page table. There are no atomics, so a plan is the same
// in every run and the same as the CPU's. What takes the time is chains of dependent instructions, 5 cycles each, and
// of loads, 600; a launch is 2000.
#include <cuda_runtime.h>

#include <algorithm>

#include "plan/share.cuh"
#include "plan/write.h"

namespace flashcore {

namespace {

constexpr int kPlanCtas = 16;
constexpr int kMostThreads = 1024;

// Every CTA makes all sums for itself, in its own memory, and then writes its part of the plan from there. That takes
// as long as one CTA takes to make them for all, and saves a launch and the way there through L2.
template <bool kInShared>
__global__ void __launch_bounds__(kMostThreads) plan_kernel(PlanJob p, Found found) {
  extern __shared__ int4 memory[];
  __shared__ Cta::Shared shared;
  const bool first = !p.beside || shares_pages(p);  // of the launches of a second plan only the first one is beside
  if (first) wait_for_primary();
  allow_dependents();
  int32_t* const own =
      kInShared ? reinterpret_cast<int32_t*>(memory) : p.scratch + found.size + blockIdx.x * sums_of(p, p.scratch).size;
  const Sums sums = sums_of(p, own);
  Cta team{shared};
  const Totals totals = Builder<Cta>(p, found, sums, team).build();

  // Kinds of items follow each other from warp to warp through the grid: each is a chain of loads, and side by side
  // they take the time of the longest.
  const int32_t threads = gridDim.x * blockDim.x;
  int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  Writer(p, found, sums, totals).write([&](int32_t n, const auto& item) {
    const int32_t end = ceil_div(n, kWarp) * kWarp;
    for (; i < end; i += threads) {
      if (i < n) item(i);
    }
    i -= end;
  });
  if (!first) wait_for_primary();
}

// A thread for every request, row and cut of a decode step as far as that goes: more of them only wait for each other.
int plan_threads(const PlanJob& p) {
  const int packed = shares_pages(p) ? ceil_div(p.batch, 16 * kWarp) * kWarp : 0;
  const int items = std::max(p.batch + packed, p.plan.num_ctas) + 1;
  return std::min(ceil_div(items, kWarp) * kWarp, kMostThreads);
}

// Dynamic shared memory that a CTA of the kernel may have on the current device.
template <auto kernel>
int64_t shared_room() {
  static const int room = [] {
    int device = 0, bytes = 0;
    cudaFuncAttributes attributes{};
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncGetAttributes(&attributes, kernel);
    bytes -= static_cast<int>(attributes.sharedSizeBytes);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess ? bytes : 0;
  }();
  return room;
}

// Launches kNear, which keeps `bytes` in shared memory, or kFar where a CTA has no room for them.
template <auto kNear, auto kFar>
cudaError_t launch(int ctas, int threads, int64_t bytes, const PlanJob& p, const Found& found) {
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (bytes > shared_room<kNear>()) return launch_dependent(kFar, ctas, threads, stream, p, found);
  return launch_dependent_shared(kNear, ctas, threads, static_cast<int>(bytes), stream, p, found);
}

// How an SM divides its memory into L1 and shared changes only while it is idle. Left to itself, the driver asks for as
// much as all CTAs that fit would need; behind the page table, which takes all SMs and lives on L1, that costs 4 us.
constexpr int kAlonePercent = 28;  // 64 KB

}  // namespace

int run_plan_cuda(const PlanParams& params) {
  const PlanJob p(params);
  const Found found = found_of(p);
  const Sums sums = sums_of(p, p.scratch);
  const bool share = shares_pages(p);
  if (found.size + kPlanCtas * sums.size > p.scratch_size) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  const auto run = [&](cudaError_t (*launch)(int, int, int64_t, const PlanJob&, const Found&), int ctas, int threads,
                       int64_t bytes) {
    if (error == cudaSuccess) error = launch(ctas, threads, bytes, p, found);
  };
  if (share) {
    run(launch<trace_kernel<true>, trace_kernel<false>>, p.batch, kTraceThreads, p.batch * sizeof(Shareable));
    run(launch<walk_kernel<true>, walk_kernel<false>>, ceil_div(p.batch, kWalkThreads / kWarp), kWalkThreads,
        walk_bytes(p));
  }
  cudaFuncSetAttribute(plan_kernel<true>, cudaFuncAttributePreferredSharedMemoryCarveout,
                       share ? cudaSharedmemCarveoutDefault : kAlonePercent);
  run(launch<plan_kernel<true>, plan_kernel<false>>, kPlanCtas, plan_threads(p), sums.size * sizeof(int32_t));
  return error;
}

}  // namespace flashcore
