// The page table of a batch as CSR, from SGLang's req_to_token.
//
// Grid (requests, chunks of columns), 256 threads. Slots of a page follow each other, so page column c of a request
// holds page id req_to_token[row, c * page_size] / page_size. Each CTA sums up the pages of the requests before its
// own: that is less work than a launch for a scan. Entries beyond a request's length are another's and are never read.
#include <cuda_runtime.h>

#include <algorithm>

#include "params.h"

namespace flashcore {

namespace {

constexpr int kThreads = 256;

__device__ int64_t length_of(const PageTableParams& p, int32_t r) { return max(p.seq_lens[r], int64_t{0}); }

__device__ int32_t columns_of(const PageTableParams& p, int32_t r) {
  return static_cast<int32_t>((length_of(p, r) + p.page_size - 1) / p.page_size);
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
  int32_t before = 0;
  for (int32_t i = threadIdx.x; i < r; i += kThreads) before += columns_of(p, i);
  const int32_t begin = sum_over_cta(before);
  const int32_t columns = r < p.batch ? columns_of(p, r) : 0;  // an empty batch has one CTA and no request

  if (blockIdx.y == 0 && threadIdx.x == 0) {
    if (r == 0) p.kv_indptr[0] = 0;
    if (r < p.batch) {
      p.kv_indptr[r + 1] = begin + columns;
      p.last_page_len[r] = columns > 0 ? static_cast<int32_t>(length_of(p, r) - int64_t{columns - 1} * p.page_size) : 0;
    }
  }
  if (columns == 0) return;
  const int32_t* slots = p.req_to_token + p.req_pool_indices[r] * p.req_to_token_stride;
  const int32_t end = min(columns, max(p.max_pages - begin, 0));
  for (int32_t c = blockIdx.y * kThreads + threadIdx.x; c < end; c += gridDim.y * kThreads) {
    p.kv_indices[begin + c] = slots[int64_t{c} * p.page_size] / p.page_size;
  }
}

}  // namespace

int run_page_table_cuda(const PageTableParams& p) {
  // Few requests may be long ones: enough CTAs in all to keep the memory busy, and eight for each request.
  const int32_t requests = std::max(p.batch, 1);
  const dim3 grid(requests, std::clamp(1024 / requests, 8, 64));
  page_table_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace flashcore
