// The page table of a batch as CSR, from SGLang's req_to_token.
//
// Grid (requests, chunks of columns), 256 threads. Slots of a page follow each other, so any of a page's slots divided
// by page_size is the page's id. The time is that of the memory sectors: the last slot of an even column and the first
// one of the odd column behind it stand side by side, in one sector unless a sector begins just between them, and a
// thread has kUnroll slots on the way before it does anything else. (SGLang's rows are context + 4 slots long: three
// in four of them begin within a sector of 64 bytes.) Each CTA sums up the pages of the requests before its own: that
// is less work than a launch for a scan. Entries beyond a request's length are another's and are never read.
#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "params.h"

namespace flashcore {

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;

__device__ int64_t length_of(const PageTableParams& p, int32_t r) { return max(p.seq_lens[r], int64_t{0}); }

__device__ int32_t columns_of(const PageTableParams& p, int64_t length) {
  return static_cast<int32_t>((length + p.page_size - 1) / p.page_size);
}

// Sum over the CTA, in every thread.
__device__ int32_t sum_over_cta(int32_t value) {
  __shared__ int32_t warp_sums[kThreads / 32];
  value = __reduce_add_sync(~0u, value);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  int32_t sum = 0;
  for (int32_t warp_sum : warp_sums) sum += warp_sum;
  return sum;
}

__global__ void __launch_bounds__(kThreads) page_table_kernel(PageTableParams p) {
  const int32_t r = blockIdx.x;
  const bool exists = r < p.batch;  // an empty batch has one CTA and no request
  allow_dependents();
  const int64_t length = exists ? length_of(p, r) : 0;
  const int32_t columns = columns_of(p, length);
  const int32_t* slots = exists ? p.req_to_token + p.req_pool_indices[r] * p.req_to_token_stride : nullptr;
  const int32_t first = blockIdx.y * kThreads + threadIdx.x, step = gridDim.y * kThreads;
  int32_t slot[kUnroll];
  const auto load = [&](int32_t column) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int32_t c = column + k * step;
      const int64_t next = int64_t{c + 1} * p.page_size;  // first key of the column behind
      slot[k] = c < columns ? slots[c % 2 == 0 && next <= length ? next - 1 : next - p.page_size] : 0;
    }
  };
  load(first);

  int32_t before = 0;
  for (int32_t i = threadIdx.x; i < r; i += kThreads) before += columns_of(p, length_of(p, i));
  const int32_t begin = sum_over_cta(before);
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    if (r == 0) p.kv_indptr[0] = 0;
    if (exists) {
      p.kv_indptr[r + 1] = begin + columns;
      p.last_page_len[r] = columns > 0 ? static_cast<int32_t>(length - int64_t{columns - 1} * p.page_size) : 0;
    }
  }
  const int32_t end = min(columns, max(p.max_pages - begin, 0));
  for (int32_t column = first; column < end; column += kUnroll * step) {
    if (column > first) load(column);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int32_t c = column + k * step;
      if (c < end) p.kv_indices[begin + c] = slot[k] / p.page_size;
    }
  }
}

}  // namespace

int run_page_table_cuda(const PageTableParams& p) {
  // Few requests may be long ones: enough CTAs in all to keep the memory busy.
  const int32_t requests = std::max(p.batch, 1);
  const dim3 grid(requests, std::clamp(1024 / requests, 1, 64));
  page_table_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace flashcore
