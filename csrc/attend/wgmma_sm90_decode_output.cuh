// Decode on Hopper: where a tile's rows go.
#pragma once

#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/math.cuh"

namespace flashcore::decode90 {

// Four channels of a row of out, or of the partials.
template <typename Traits>
__device__ __forceinline__ void store4(const AttendParams& p, bool direct, int64_t row, int d, float4 o) {
  using Element = typename Traits::Element;
  const int64_t offset = row * Traits::kHeadDim + d;
  if (direct) {
    const uint2 packed = make_uint2(pack2<Element>(o.x, o.y), pack2<Element>(o.z, o.w));
    *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + offset) = packed;
  } else {
    *reinterpret_cast<float4*>(p.partial_o + offset) = o;
  }
}

// Two channels.
template <typename Traits>
__device__ __forceinline__ void store2(const AttendParams& p, bool direct, int64_t row, int d, float x, float y) {
  using Element = typename Traits::Element;
  const int64_t offset = row * Traits::kHeadDim + d;
  if (direct) {
    *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.out) + offset) = pack2<Element>(x, y);
  } else {
    *reinterpret_cast<float2*>(p.partial_o + offset) = make_float2(x, y);
  }
}

__device__ __forceinline__ void store_lse(const AttendParams& p, bool direct, int64_t row, float lse) {
  float* base = direct ? p.lse : p.partial_lse;
  if (base != nullptr) base[row] = lse;
}

// Rows of out and lse, or of the partials.
template <typename Traits>
struct GlobalRows {
  const AttendParams& p;

  __device__ __forceinline__ static void meet() {}
  __device__ __forceinline__ void store4(bool direct, int row, int d, float4 o) const {
    decode90::store4<Traits>(p, direct, row, d, o);
  }
  __device__ __forceinline__ void store_lse(bool direct, int row, float lse) const {
    decode90::store_lse(p, direct, row, lse);
  }
};

// A row of a tile without keys: zeros, LSE -inf; all lanes together.
template <typename Traits, typename Sink>
__device__ __forceinline__ void store_empty(const Sink& sink, bool direct, int row, int lane) {
  for (int d = 4 * lane; d < Traits::kHeadDim; d += 128) {
    sink.store4(direct, row, d, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  if (lane == 0) sink.store_lse(direct, row, -INFINITY);
}

}  // namespace flashcore::decode90
