// New keys and values into their pages, and the summaries (kinds: rules.h) of the pages that they change.
//
// A step of one token a request: grid (requests, KV heads), 128 threads. Where a token fills its page, its CTA
// summarises that: all threads fetch the page's keys to shared memory, one sums up a channel.
// Else: grid (requests, chunks of page columns), 128 threads. Pages that requests share are summarised by each of them,
// with the same values.
#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "summary/summarize.cuh"

namespace flashcore {

namespace {

constexpr int kThreads = 128;
constexpr int kStagedBytes = 16 * 1024;

// Copies 8 channels of token `token` and KV head `head` to where they belong; both caches.
template <class T>
__device__ void store_block(const StoreParams& p, int64_t token, int32_t head, int32_t channel) {
  const NewTokens& from = p.tokens;
  const int64_t slot = from.slots[token], page = slot / p.pages.page_size, offset = slot % p.pages.page_size;
  const auto copy = [&](const void* source, int64_t stride_token, int64_t stride_head, void* cache, int64_t page_stride,
                        int64_t token_stride, int64_t head_stride) {
    const T* block = static_cast<const T*>(source) + token * stride_token + head * stride_head + channel;
    T* to = static_cast<T*>(cache) + page * page_stride + offset * token_stride + head * head_stride + channel;
    *reinterpret_cast<Block<T>*>(to) = load_block(block);
  };
  copy(from.k, from.k_stride_token, from.k_stride_head, const_cast<void*>(p.pages.k), p.pages.k_stride_page,
       p.pages.k_stride_token, p.pages.k_stride_head);
  copy(from.v, from.v_stride_token, from.v_stride_head, p.v, p.v_stride_page, p.v_stride_token, p.v_stride_head);
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) store_step_kernel(StoreParams p) {
  allow_dependents();  // at once: who begins beside this kernel waits for it, and so for what is older
  wait_for_primary();
  const int32_t r = blockIdx.x, head = blockIdx.y;
  if (p.tokens.k != nullptr) {
    for (int32_t channel = threadIdx.x * kBlock; channel < p.pages.head_dim; channel += kThreads * kBlock) {
      store_block<T>(p, r, head, channel);
    }
  }
  const int32_t filled = filled_page(p.pages, r);
  if (filled < 0) return;
  __shared__ alignas(16) unsigned char memory[kStagedBytes];
  __syncthreads();
  summarize_full<kThreads, T, S>(p.pages, filled, head, memory, kStagedBytes);
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) store_pages_kernel(StoreParams p) {
  const SummarizeParams& s = p.pages;
  const int32_t r = blockIdx.x, begin = s.kv_indptr[r], pages = s.kv_indptr[r + 1] - begin;
  const int32_t blocks = s.head_dim / kBlock, items = s.num_kv_heads * blocks;
  const int32_t keys = pages > 0 ? (pages - 1) * s.page_size + s.last_page_len[r] : 0;
  int32_t first_new = keys, first_token = 0;  // key, and its number among the new tokens
  if (p.tokens.k != nullptr) {
    first_token = p.tokens.qo_indptr[r];
    first_new = keys - (p.tokens.qo_indptr[r + 1] - first_token);
  }
  for (int32_t column = max(s.first_page[r], 0) + blockIdx.y; column < pages; column += gridDim.y) {
    const int32_t tokens = min(keys - column * s.page_size, s.page_size);
    if (tokens <= 0) continue;
    const int32_t skipped = min(max(first_new - column * s.page_size, 0), tokens);
    for (int32_t i = skipped * items + threadIdx.x; i < tokens * items; i += kThreads) {
      const int32_t token = first_token + column * s.page_size + i / items - first_new, item = i % items;
      store_block<T>(p, token, item / blocks, item % blocks * kBlock);
    }
    if (skipped < tokens) __syncthreads();
    const int64_t page = s.kv_indices[begin + column];
    for (int32_t i = threadIdx.x; i < items; i += kThreads) {
      const int32_t head = i / blocks, channel = i % blocks * kBlock;
      const T* k = static_cast<const T*>(s.k) + page * s.k_stride_page + head * s.k_stride_head + channel;
      summarize_channels<kBlock, T, S>(s, k, s.k_stride_token, tokens, page, head, channel);
    }
  }
}

}  // namespace

int run_store_cuda(const StoreParams& p) {
  const SummarizeParams& s = p.pages;
  if (s.batch == 0) return 0;
  const auto stream = static_cast<cudaStream_t>(s.stream);
  return with_elements(s, [&](auto key, auto summary) {
    using T = decltype(key);
    using S = decltype(summary);
    if (s.first_page == nullptr) {
      return launch_dependent_grid(store_step_kernel<T, S>, dim3(s.batch, s.num_kv_heads), kThreads, 0, stream, p);
    }
    const dim3 grid(s.batch, std::clamp(1024 / s.batch, 1, std::max(s.max_columns, 1)));
    store_pages_kernel<T, S><<<grid, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace flashcore
