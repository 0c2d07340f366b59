// 8 elements (bf16, fp16 or e4m3) as floats, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "summary/rules.h"

namespace flashcore {

using Fp8 = __nv_fp8_e4m3;

// An instruction each; __bfloat1622float2 takes three for both.
__device__ inline float2 to_floats(const __nv_bfloat162& pair) {
  const uint32_t word = reinterpret_cast<const uint32_t&>(pair);
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ inline float2 to_floats(const __half2& pair) { return __half22float2(pair); }
__device__ inline float2 to_floats(const __nv_fp8x2_e4m3& pair) { return static_cast<float2>(pair); }
__device__ inline void from_floats(__nv_bfloat162& pair, float a, float b) { pair = __floats2bfloat162_rn(a, b); }
__device__ inline void from_floats(__half2& pair, float a, float b) { pair = __floats2half2_rn(a, b); }
__device__ inline void from_floats(__nv_fp8x2_e4m3& pair, float a, float b) {
  pair = __nv_fp8x2_e4m3(make_float2(a, b));  // what is too large becomes the largest value
}

template <class T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<Fp8> {
  using type = __nv_fp8x2_e4m3;
};

// As loaded: 16 bytes, 8 of e4m3.
template <class T>
struct alignas(kBlock * sizeof(T)) Block {
  uint32_t words[kBlock * sizeof(T) / sizeof(uint32_t)];
};

template <class T>
__device__ Block<T> load_block(const T* from) {
  return *reinterpret_cast<const Block<T>*>(from);
}

template <class T>
__device__ void unpack(const Block<T>& block, float (&to)[kBlock]) {
  const auto* pairs = reinterpret_cast<const typename PairOf<T>::type*>(block.words);
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    const float2 pair = to_floats(pairs[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

template <class T>
__device__ void store_block(T* to, const float (&from)[kBlock]) {
  Block<T> block;
  auto* pairs = reinterpret_cast<typename PairOf<T>::type*>(block.words);
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) from_floats(pairs[i], from[2 * i], from[2 * i + 1]);
  *reinterpret_cast<Block<T>*>(to) = block;
}

// Calls f(T{}, S{}) with the element types of the keys and of their summaries.
template <class F>
cudaError_t with_elements(const SummarizeParams& p, F f) {
  const auto of_keys = [&](auto element) { return p.summaries.fp8 ? f(element, Fp8{}) : f(element, element); };
  if (p.head_dim % kBlock != 0) return cudaErrorInvalidValue;
  if (p.dtype == DType::bf16) return of_keys(__nv_bfloat16{});
  return p.dtype == DType::fp16 ? of_keys(__half{}) : cudaErrorInvalidValue;
}

}  // namespace flashcore
