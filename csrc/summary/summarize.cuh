// A page's summary, kWide (8 or 1) channels of a head a thread.
//
// For mean and deviation a thread goes through the page's tokens twice: the second time they come from the cache, and
// the deviation loses no digits to a large mean.
#pragma once

#include "summary/element.cuh"

namespace flashcore {

template <int kWide, class T>
__device__ auto load_wide(const T* from) {
  if constexpr (kWide == 1) {
    return *from;
  } else {
    return load_block(from);
  }
}

template <class T>
__device__ void unpack(const T& element, float (&to)[1]) {
  to[0] = static_cast<float>(element);
}

template <class S>
__device__ void store_block(S* to, const float (&from)[1]) {
  *to = S(from[0]);
}

// f(x) for the channels x[kWide] of every token in turn, several loads on the way at a time.
template <int kWide, class T, class F>
__device__ void each_token(const T* k, int64_t stride, int32_t tokens, F f) {
  constexpr int32_t kAhead = 8;
  for (int32_t begin = 0; begin < tokens; begin += kAhead) {
    decltype(load_wide<kWide>(k)) loaded[kAhead];
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) loaded[i] = load_wide<kWide>(k + min(begin + i, tokens - 1) * stride);
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) {
      float x[kWide];
      unpack(loaded[i], x);
      if (begin + i < tokens) f(x);
    }
  }
}

// Channels [channel, channel + kWide) of a page and head, whose keys there are at k.
template <int kWide, class T, class S>
__device__ void summarize_channels(const SummarizeParams& p, const T* k, int64_t stride, int32_t tokens, int64_t page,
                                   int32_t head, int32_t channel) {
  const SummaryKind kind = p.summaries.kind;
  float first[kWide], second[kWide] = {};
  unpack(load_wide<kWide>(k), first);
  if (kind == SummaryKind::min_max) {
    for (int i = 0; i < kWide; ++i) second[i] = first[i];
    each_token<kWide>(k, stride, tokens, [&](const float (&x)[kWide]) {
      for (int i = 0; i < kWide; ++i) {
        first[i] = smaller(first[i], x[i]);
        second[i] = larger(second[i], x[i]);
      }
    });
  } else {
    each_token<kWide>(k + stride, stride, tokens - 1, [&](const float (&x)[kWide]) {
      for (int i = 0; i < kWide; ++i) first[i] = __fadd_rn(first[i], x[i]);
    });
    for (float& mean : first) mean = __fdiv_rn(mean, static_cast<float>(tokens));
  }
  if (kind == SummaryKind::mean_std) {
    each_token<kWide>(k, stride, tokens, [&](const float (&x)[kWide]) {
      for (int i = 0; i < kWide; ++i) {
        const float distance = __fsub_rn(x[i], first[i]);
        second[i] = __fadd_rn(second[i], __fmul_rn(distance, distance));
      }
    });
    for (float& square : second) square = __fsqrt_rn(__fdiv_rn(square, static_cast<float>(tokens)));
  }
  const int32_t vectors = p.summaries.vectors();
  S* out = static_cast<S*>(p.summaries.data) + (page * p.num_kv_heads + head) * vectors * p.head_dim + channel;
  store_block(out, first);
  if (vectors == 2) store_block(out + p.head_dim, second);
}

// The summary of a page that is full, by kThreads threads, all of a CTA's. Its keys pass through `memory`, if that is
// large enough.
template <int kThreads, class T, class S>
__device__ void summarize_full(const SummarizeParams& p, int64_t page, int32_t kv_head, unsigned char* memory,
                               int32_t memory_bytes) {
  const int32_t blocks = p.head_dim / kBlock;
  const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + kv_head * p.k_stride_head;
  int64_t stride = p.k_stride_token;
  if (p.page_size * p.head_dim * static_cast<int32_t>(sizeof(T)) <= memory_bytes) {
    T* staged = reinterpret_cast<T*>(memory);
    for (int32_t i = threadIdx.x; i < p.page_size * blocks; i += kThreads) {
      *reinterpret_cast<Block<T>*>(staged + i * kBlock) = load_block(k + i / blocks * stride + i % blocks * kBlock);
    }
    k = staged;
    stride = p.head_dim;
    __syncthreads();
  }
  for (int32_t channel = threadIdx.x; channel < p.head_dim; channel += kThreads) {
    summarize_channels<1, T, S>(p, k + channel, stride, p.page_size, page, kv_head, channel);
  }
}

}  // namespace flashcore
