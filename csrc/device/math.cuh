// Scalar maths of the attention kernels. Softmax runs in base 2: log2(e) is folded into the scale of the logits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "arithmetic.h"

namespace flashcore {

// 2^x to 2 ulp; exp2(-inf) = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to 2^-22, absolutely near 1 and relatively elsewhere; -inf for 0. log2f takes some thirty instructions, each
// of which waits for the one before.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a sum of weights is divided by: 1 / sum to 1 ulp; 0 where nothing has been added.
__device__ __forceinline__ float inverse_or_zero(float sum) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(sum));
  return sum > 0.0f ? y : 0.0f;
}

// tanh by way of 2^x: absolute error near 1e-6, where tanh.approx has 5e-4, too coarse for a logit cap of 50.
__device__ __forceinline__ float tanh_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(2.0f * kLog2E * x, 126.0f)));
}

// Two floats to two 16-bit elements, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace flashcore
