// What the cublaslt variant does around its matmuls: gather, softmax with the online rescale, output.
//
// A warp takes a row: a query of a head, with 16-byte accesses. Scores are in base 2 (log2(e) is in the matmul's
// alpha). P is written in half precision over the S of its own row, which the warp then holds in registers, so that a
// score costs only its own bytes of L2.
//   m' = max(m, max S), P = 2^(S - m'), l = l 2^(m - m') + sum P, O = O 2^(m - m')
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "attend/cublaslt_schedule.h"
#include "device/math.cuh"
#include "params.h"

namespace flashcore::cublaslt {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A unit of pairs in the scratch of its lane; rows are (pair, query token, query head of the group).
struct Unit {
  void* q;       // [pairs, qo_len, group, head_dim]
  void* k;       // [pairs, kv_len, head_dim]
  void* v;       // as k
  void* scores;  // [pairs, block * group, keys]
  float* o;      // [pairs, span * group, head_dim] not yet divided by sum
  float* max;    // [pairs, span * group] base 2
  float* sum;    // as max
  int32_t first_pair, pairs;
  int32_t qo_len, kv_len, offset, span, block;  // of CublasLtSchedule
};

// A chunk of keys for a block of queries.
struct Chunk {
  int32_t first_query, key_begin, keys;
  bool first;
};

// Two bf16 numbers in fp16, which holds any of them in 2^-14..2^16 exactly; larger ones become the largest.
__device__ __forceinline__ uint32_t half_of_bf16(uint32_t pair) {
  const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000u);
  return pack2<__half>(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
}

// The request behind a pair, right-aligned in the padded layout.
struct Request {
  int32_t kv_head, qo_begin, qo_pad, kv_pad, page_begin;

  __device__ Request(const AttendParams& p, const Unit& unit, int pair) {
    const int index = (unit.first_pair + pair) / p.num_kv_heads;
    kv_head = (unit.first_pair + pair) % p.num_kv_heads;
    qo_begin = p.plan.qo_indptr[index];
    qo_pad = unit.qo_len - (p.plan.qo_indptr[index + 1] - qo_begin);
    page_begin = p.plan.kv_indptr[index];
    const int pages = p.plan.kv_indptr[index + 1] - page_begin;
    kv_pad = unit.kv_len - (pages == 0 ? 0 : (pages - 1) * p.page_size + p.plan.last_page_len[index]);
  }
};

// ----------------------------------------------------------------------------------------------------------------
// gather

// K and V out of their pages, q out of its tokens; zeros in the padding, so that no product is NaN there. kToHalf: Q
// and K from bf16 to fp16, so that S can be in fp16, whose rounding is finer than that of P in bf16.
// Grid: (groups of kGatherRows rows of a pair, first the keys, then the queries; pairs).
constexpr int kGatherRows = CublasLtSchedule::kGrain;

template <int kHeadDim, bool kToHalf>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Unit unit) {
  constexpr int kVectors = kHeadDim / 8;  // of 16 bytes, a thread each
  constexpr int kStep = kThreads / kVectors, kSteps = kGatherRows / kStep;
  const int pair = blockIdx.y, at = 8 * (threadIdx.x % kVectors), group = p.num_qo_heads / p.num_kv_heads;
  const int first = blockIdx.x * kGatherRows + threadIdx.x / kVectors;
  const Request request(p, unit, pair);
  const auto load = [at](const void* base, int64_t offset) {
    return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + offset + at);
  };
  const auto store = [at](void* base, int64_t row, uint4 value) {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + row * kHeadDim + at) = value;
  };
  const auto convert = [](uint4 x) {
    if constexpr (!kToHalf) return x;
    return make_uint4(half_of_bf16(x.x), half_of_bf16(x.y), half_of_bf16(x.z), half_of_bf16(x.w));
  };
  if (first < unit.kv_len) {
    uint4 k[kSteps] = {}, v[kSteps] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int key = first + i * kStep - request.kv_pad;
      if (key < 0) continue;
      const int64_t page = p.plan.kv_indices[request.page_begin + key / p.page_size];
      const int64_t token = key % p.page_size;
      k[i] = load(p.k, page * p.k_stride_page + token * p.k_stride_token + request.kv_head * p.k_stride_head);
      v[i] = load(p.v, page * p.v_stride_page + token * p.v_stride_token + request.kv_head * p.v_stride_head);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t row = int64_t{pair} * unit.kv_len + first + i * kStep;
      store(unit.k, row, convert(k[i]));
      store(unit.v, row, v[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = first + i * kStep - unit.kv_len, token = row / group - request.qo_pad;
      const int64_t head = request.kv_head * group + row % group;
      uint4 q{};
      if (token >= 0) q = load(p.q, (request.qo_begin + token) * p.q_stride_token + head * p.q_stride_head);
      store(unit.q, int64_t{pair} * unit.qo_len * group + row, convert(q));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// softmax

// 16 bytes of a row of S, kept as they came: half the registers of floats, twice the rows in flight.
template <typename Score>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  float s[kSize] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};

  __device__ __forceinline__ void load(const float* from) {
    *reinterpret_cast<float4*>(s) = *reinterpret_cast<const float4*>(from);
  }
  // -inf in place of the elements outside of [begin, end).
  __device__ __forceinline__ void mask(int begin, int end) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) s[i] = i >= begin && i < end ? s[i] : -INFINITY;
  }
  __device__ __forceinline__ float max() const { return fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])); }
  __device__ __forceinline__ void minus(float base, float (&x)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = s[i] - base;
  }
};

// A logit beyond the range of fp16 became infinite: inf - inf would be NaN, so it counts as the largest number.
template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  static constexpr uint32_t kMinusInf2 = 0xFC00FC00u, kLargest2 = 0x7BFF7BFFu;
  uint32_t s[kSize / 2] = {kMinusInf2, kMinusInf2, kMinusInf2, kMinusInf2};

  __device__ __forceinline__ void load(const __half* from) {
    *reinterpret_cast<uint4*>(s) = *reinterpret_cast<const uint4*>(from);
  }
  __device__ __forceinline__ void mask(int begin, int end) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const uint32_t half = 0xFFFFu << 16 * (i % 2);
      if (i < begin || i >= end) s[i / 2] = (s[i / 2] & ~half) | (kMinusInf2 & half);
    }
  }
  __device__ __forceinline__ float max() const {
    const __half2 pair = __hmin2(__hmax2(__hmax2(at(0), at(1)), __hmax2(at(2), at(3))), largest());
    return fmaxf(__low2float(pair), __high2float(pair));
  }
  __device__ __forceinline__ void minus(float base, float (&x)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const float2 pair = __half22float2(__hmin2_nan(at(i), largest()));
      x[2 * i] = pair.x - base;
      x[2 * i + 1] = pair.y - base;
    }
  }

 private:
  __device__ __forceinline__ __half2 at(int i) const { return reinterpret_cast<const __half2&>(s[i]); }
  static __device__ __forceinline__ __half2 largest() {
    const uint32_t bits = kLargest2;
    return reinterpret_cast<const __half2&>(bits);
  }
};

template <typename Element, int kSize>
__device__ __forceinline__ void store_half(Element* to, const float (&x)[kSize]) {
  uint32_t packed[kSize / 2];
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) packed[i] = pack2<Element>(x[2 * i], x[2 * i + 1]);
  if constexpr (kSize == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
  }
}

// kMaxKeys: capacity of a warp's registers, at least chunk.keys.
template <typename Element, typename Score, int kMaxKeys>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Unit unit, const Chunk chunk) {
  constexpr int kSize = Vector<Score>::kSize, kVectors = kMaxKeys / (32 * kSize);
  const int lane = threadIdx.x % 32;
  const int group = p.num_qo_heads / p.num_kv_heads, rows = unit.block * group;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= unit.pairs * rows) return;
  const int query = chunk.first_query + row % rows / group;
  const int open_row = row / rows * unit.span * group + (chunk.first_query % unit.span) * group + row % rows;
  // The row is on its way before it is known what of it the query sees.
  const int end = p.causal ? min(unit.offset + query + 1 - chunk.key_begin, chunk.keys) : chunk.keys;
  auto* scores = static_cast<Score*>(unit.scores) + int64_t{row} * chunk.keys;
  Vector<Score> row_scores[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int key = (32 * v + lane) * kSize;
    if (key < end) row_scores[v].load(scores + key);
  }
  const float old_max = chunk.first ? -INFINITY : unit.max[open_row];
  const float old_sum = chunk.first ? 0.0f : unit.sum[open_row];
  const Request request(p, unit, row / rows);
  if (query < request.qo_pad) return;
  const int begin = max(request.kv_pad - chunk.key_begin, 0);

  float largest = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int key = (32 * v + lane) * kSize;
    if (key < begin || key + kSize > end) row_scores[v].mask(begin - key, end - key);
    largest = fmaxf(largest, row_scores[v].max());
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));

  const float new_max = fmaxf(old_max, largest);
  const float base = new_max == -INFINITY ? 0.0f : new_max;  // nothing seen yet: 2^(-inf - 0) = 0, never inf - inf
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int key = (32 * v + lane) * kSize;
    float x[kSize];
    row_scores[v].minus(base, x);
#pragma unroll
    for (float& s : x) {
      s = exp2_fast(s);
      sum += s;
    }
    if (key < chunk.keys) store_half(reinterpret_cast<Element*>(scores) + key, x);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);

  const float factor = exp2_fast(old_max - base);
  if (lane == 0) {
    unit.max[open_row] = new_max;
    unit.sum[open_row] = old_sum * factor + sum;
  }
  if (chunk.first || factor == 1.0f) return;
  for (int d = 4 * lane; d < p.head_dim; d += 128) {
    auto* o = reinterpret_cast<float4*>(unit.o + int64_t{open_row} * p.head_dim + d);
    *o = make_float4(o->x * factor, o->y * factor, o->z * factor, o->w * factor);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// output

// O / l of `tokens` query tokens of each pair, 8 elements a thread. Grid: (groups of rows of a pair, pairs).
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    output_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Unit unit, int first_query) {
  const int vectors = p.head_dim / 8, group = p.num_qo_heads / p.num_kv_heads, pair = blockIdx.y;
  const int row = blockIdx.x * (kThreads / vectors) + threadIdx.x / vectors, at = 8 * (threadIdx.x % vectors);
  const int64_t open_row = int64_t{pair} * unit.span * group + row;
  const auto* o = reinterpret_cast<const float4*>(unit.o + open_row * p.head_dim + at);
  const float4 low = o[0], high = o[1];
  const float sum = unit.sum[open_row];
  const Request request(p, unit, pair);
  const int token = first_query + row / group - request.qo_pad;
  if (token < 0) return;
  const int64_t item = int64_t{request.qo_begin + token} * p.num_qo_heads + request.kv_head * group + row % group;
  const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
  const float x[8] = {low.x * scale,  low.y * scale,  low.z * scale,  low.w * scale,
                      high.x * scale, high.y * scale, high.z * scale, high.w * scale};
  store_half(static_cast<Element*>(p.out) + item * p.head_dim + at, x);
  if (p.lse != nullptr && at == 0) p.lse[item] = sum > 0.0f ? unit.max[open_row] + log2f(sum) : -INFINITY;
}

// ----------------------------------------------------------------------------------------------------------------
// tuning

// Numbers of both signs in [-1, 1): matrix units run faster on zeros, which would pick the wrong algorithm.
template <typename Element>
__global__ void __launch_bounds__(kThreads) noise_kernel(Element* to, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x = (x ^ x >> 15) * 2246822519u;
    to[i] = static_cast<Element>(static_cast<float>(x >> 8) * (1.0f / (1 << 23)) - 1.0f);
  }
}

}  // namespace flashcore::cublaslt
