// Page summaries (kinds: rules.h) of pages whose keys changed, for each KV head.
//
// Grid (requests, chunks of page columns), 128 threads. Pages that requests share are written by each of them, with
// the same values.
#include <cuda_runtime.h>

#include <algorithm>

#include "summary/summarize.cuh"

namespace flashcore {

namespace {

constexpr int kThreads = 128;

template <class T, class S>
__global__ void __launch_bounds__(kThreads) summarize_kernel(SummarizeParams p) {
  const int32_t r = blockIdx.x, begin = p.kv_indptr[r], pages = p.kv_indptr[r + 1] - begin;
  const int32_t blocks = p.head_dim / kBlock;
  for (int32_t column = max(p.first_page[r], 0) + blockIdx.y; column < pages; column += gridDim.y) {
    const int32_t tokens = column + 1 < pages ? p.page_size : p.last_page_len[r];
    if (tokens <= 0) continue;
    const int64_t page = p.kv_indices[begin + column];
    for (int32_t i = threadIdx.x; i < p.num_kv_heads * blocks; i += kThreads) {
      const int32_t head = i / blocks, channel = i % blocks * kBlock;
      const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + head * p.k_stride_head + channel;
      summarize_channels<kBlock, T, S>(p, k, p.k_stride_token, tokens, page, head, channel);
    }
  }
}

}  // namespace

int run_summarize_cuda(const SummarizeParams& p) {
  if (p.batch == 0) return 0;
  const dim3 grid(p.batch, std::clamp(1024 / p.batch, 1, std::max(p.max_columns, 1)));
  return with_elements(p, [&](auto key, auto summary) {
    summarize_kernel<decltype(key), decltype(summary)><<<grid, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace flashcore
