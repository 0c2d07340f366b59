// Page summaries: mean and standard deviation of K in each channel over the tokens of a page, for each KV head.
//
// Grid (requests, chunks of page columns); a thread owns 8 channels of a head and goes through the page's tokens twice:
// the second time they come from the cache, and the deviation loses no digits to a large mean. Pages that requests
// share are written by each of them, with the same values.
#include <cuda_runtime.h>

#include <algorithm>

#include "summary/element.cuh"

namespace flashcore {

namespace {

constexpr int kThreads = 128;

template <class T>
__device__ void summarize_block(const T* k, int64_t stride, int32_t tokens, T* mean_out, T* deviation_out) {
  float mean[kBlock] = {}, square[kBlock] = {}, x[kBlock];
#pragma unroll 4
  for (int32_t t = 0; t < tokens; ++t) {
    load_block(k + t * stride, x);
    for (int i = 0; i < kBlock; ++i) mean[i] = __fadd_rn(mean[i], x[i]);
  }
  for (float& m : mean) m = __fdiv_rn(m, static_cast<float>(tokens));
#pragma unroll 4
  for (int32_t t = 0; t < tokens; ++t) {
    load_block(k + t * stride, x);
    for (int i = 0; i < kBlock; ++i) {
      const float distance = __fsub_rn(x[i], mean[i]);
      square[i] = __fadd_rn(square[i], __fmul_rn(distance, distance));
    }
  }
  for (float& s : square) s = __fsqrt_rn(__fdiv_rn(s, static_cast<float>(tokens)));
  store_block(mean_out, mean);
  store_block(deviation_out, square);
}

template <class T>
__global__ void __launch_bounds__(kThreads) summarize_kernel(SummarizeParams p) {
  const int32_t r = blockIdx.x, begin = p.kv_indptr[r], pages = p.kv_indptr[r + 1] - begin;
  const int32_t first = p.first_page ? max(p.first_page[r], 0) : max(pages - 1, 0);
  const int32_t blocks = p.head_dim / kBlock;
  for (int32_t column = first + blockIdx.y; column < pages; column += gridDim.y) {
    const int32_t tokens = column + 1 < pages ? p.page_size : p.last_page_len[r];
    if (tokens <= 0) continue;
    const int64_t page = p.kv_indices[begin + column];
    for (int32_t i = threadIdx.x; i < p.num_kv_heads * blocks; i += kThreads) {
      const int32_t head = i / blocks, channel = i % blocks * kBlock;
      const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + head * p.k_stride_head + channel;
      T* mean = static_cast<T*>(p.summaries) + (page * 2 * p.num_kv_heads + head) * p.head_dim + channel;
      summarize_block(k, p.k_stride_token, tokens, mean, mean + int64_t{p.num_kv_heads} * p.head_dim);
    }
  }
}

}  // namespace

int run_summarize_cuda(const SummarizeParams& p) {
  if (p.batch == 0) return 0;
  if (p.dtype == DType::fp32 || p.head_dim % kBlock != 0) return cudaErrorInvalidValue;
  const dim3 grid(p.batch, p.first_page ? std::clamp(1024 / p.batch, 1, std::max(p.max_columns, 1)) : 1);
  const auto kernel = p.dtype == DType::bf16 ? summarize_kernel<__nv_bfloat16> : summarize_kernel<__half>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace flashcore
