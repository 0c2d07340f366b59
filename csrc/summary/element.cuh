// 16 bytes of bf16 or fp16 as 8 floats, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "summary/rules.h"

namespace flashcore {

__device__ inline float2 to_floats(const __nv_bfloat162& pair) { return __bfloat1622float2(pair); }
__device__ inline float2 to_floats(const __half2& pair) { return __half22float2(pair); }
__device__ inline void from_floats(__nv_bfloat162& pair, float a, float b) { pair = __floats2bfloat162_rn(a, b); }
__device__ inline void from_floats(__half2& pair, float a, float b) { pair = __floats2half2_rn(a, b); }

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

template <class T>
__device__ void load_block(const T* from, float (&to)[kBlock]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  for (int i = 0; i < kBlock / 2; ++i) {
    const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    const float2 pair = to_floats(reinterpret_cast<const typename PairOf<T>::type&>(word));
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

template <class T>
__device__ void store_block(T* to, const float (&from)[kBlock]) {
  uint32_t words[kBlock / 2];
  for (int i = 0; i < kBlock / 2; ++i) {
    from_floats(reinterpret_cast<typename PairOf<T>::type&>(words[i]), from[2 * i], from[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace flashcore
