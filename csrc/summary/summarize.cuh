// A page's summary by the threads of a CTA, each of which owns 8 channels of a head.
//
// For mean and deviation a thread goes through the page's tokens twice: the second time they come from the cache, and
// the deviation loses no digits to a large mean.
#pragma once

#include "summary/element.cuh"

namespace flashcore {

// f(x) for the channels x[8] of every token in turn, several loads on the way at a time.
template <class T, class F>
__device__ void each_token(const T* k, int64_t stride, int32_t tokens, F f) {
  constexpr int32_t kAhead = 8;
  for (int32_t begin = 0; begin < tokens; begin += kAhead) {
    Block<T> blocks[kAhead];
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) blocks[i] = load_block(k + min(begin + i, tokens - 1) * stride);
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) {
      float x[kBlock];
      unpack(blocks[i], x);
      if (begin + i < tokens) f(x);
    }
  }
}

template <class T, class S>
__device__ void summarize_channels(const T* k, int64_t stride, int32_t tokens, SummaryKind kind, S* out,
                                   int32_t to_second) {
  float first[kBlock], second[kBlock] = {};
  unpack(load_block(k), first);
  if (kind == SummaryKind::min_max) {
    for (int i = 0; i < kBlock; ++i) second[i] = first[i];
    each_token(k, stride, tokens, [&](const float (&x)[kBlock]) {
      for (int i = 0; i < kBlock; ++i) {
        first[i] = smaller(first[i], x[i]);
        second[i] = larger(second[i], x[i]);
      }
    });
  } else {
    each_token(k + stride, stride, tokens - 1, [&](const float (&x)[kBlock]) {
      for (int i = 0; i < kBlock; ++i) first[i] = __fadd_rn(first[i], x[i]);
    });
    for (float& mean : first) mean = __fdiv_rn(mean, static_cast<float>(tokens));
  }
  if (kind == SummaryKind::mean_std) {
    each_token(k, stride, tokens, [&](const float (&x)[kBlock]) {
      for (int i = 0; i < kBlock; ++i) {
        const float distance = __fsub_rn(x[i], first[i]);
        second[i] = __fadd_rn(second[i], __fmul_rn(distance, distance));
      }
    });
    for (float& square : second) square = __fsqrt_rn(__fdiv_rn(square, static_cast<float>(tokens)));
  }
  store_block(out, first);
  if (kind != SummaryKind::mean) store_block(out + to_second, second);
}

template <class T, class S, int kThreads>
__device__ void summarize_page(const SummarizeParams& p, int64_t page, int32_t tokens) {
  const int32_t blocks = p.head_dim / kBlock, vectors = p.summaries.vectors();
  for (int32_t i = threadIdx.x; i < p.num_kv_heads * blocks; i += kThreads) {
    const int32_t head = i / blocks, channel = i % blocks * kBlock;
    const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + head * p.k_stride_head + channel;
    S* out = static_cast<S*>(p.summaries.data) + (page * p.num_kv_heads + head) * vectors * p.head_dim + channel;
    summarize_channels(k, p.k_stride_token, tokens, p.summaries.kind, out, p.head_dim);
  }
}

}  // namespace flashcore
