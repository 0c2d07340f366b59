// The softmax of a consumer warpgroup of the Hopper prefill kernel: masks, references, exponentials and sums of the two
// rows that a thread holds a part of.
#pragma once

#include <climits>

#include "attend/wgmma_sm90_prefill_traits.cuh"
#include "device/math.cuh"

namespace flashcore::prefill {

// The two rows a thread holds: which keys they see, and their running softmax.
struct RowState {
  int32_t first[2], last[2];  // visible keys of the row, inclusive
  float reference[2];         // the logit P is relative to, in units of the raw logits
  int32_t limit_bits[2];      // only a logit whose bits are no less can be a new reference
  float sum[2];               // of this thread's columns
};
constexpr float kNoReference = -1e37f;  // finite, so that no difference is NaN

// Sets the logits of keys before `first` (kBefore) or after `last` of their row to -inf. `begin`: the block's first
// key.
template <bool kBefore, int kElements>
__device__ __forceinline__ void mask(float (&s)[kElements], const RowState& rows, int begin) {
  const int column = begin + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int limit = (kBefore ? rows.first[i] : rows.last[i] + 1) - column;
    // Of the thread's columns 0, 1, 8, 9, 16, ... so many lie below the limit: the low bits of a word, which the
    // hardware moves to predicates several at a time.
    const uint32_t keys = max(limit, 0), below = min(keys / 8 * 2 + min(keys % 8, 2), kElements / 2);
    const uint32_t word = below == 32 ? ~0u : (1u << below) - 1;
    const uint32_t hidden = kBefore ? word : ~word;
#pragma unroll
    for (int j = 0; j < kElements / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (hidden >> (2 * j + e) & 1) s[4 * j + 2 * i + e] = -INFINITY;
      }
    }
  }
}

// Exchanges with the three other lanes that hold the same row.
template <typename T>
__device__ __forceinline__ T quad_max(T x) {
  x = max(x, __shfl_xor_sync(0xffffffff, x, 1));
  return max(x, __shfl_xor_sync(0xffffffff, x, 2));
}

// The largest of the thread's logits in one of its rows, by their bits as integers, of which the hardware takes three
// at a time: floats that are not negative have their bits' order.
template <int kElements>
__device__ __forceinline__ int32_t largest_bits(const float (&s)[kElements], int row) {
  int32_t bits[2] = {__float_as_int(s[2 * row]), __float_as_int(s[2 * row + 1])};
#pragma unroll
  for (int j = 1; j < kElements / 4; ++j) {
    bits[j % 2] = __vimax3_s32(bits[j % 2], __float_as_int(s[4 * j + 2 * row]), __float_as_int(s[4 * j + 2 * row + 1]));
  }
  return max(bits[0], bits[1]);
}

// The same of any floats.
template <int kElements>
__device__ __forceinline__ float largest_float(const float (&s)[kElements], int row) {
  float even = s[2 * row], odd = s[2 * row + 1];
#pragma unroll
  for (int j = 1; j < kElements / 4; ++j) {
    even = fmaxf(even, s[4 * j + 2 * row]);
    odd = fmaxf(odd, s[4 * j + 2 * row + 1]);
  }
  return fmaxf(even, odd);
}

// The largest logit so far becomes the reference of its row: its P is then 1, which 16 bits hold and do not round.
// Returns whether O * factor[i] is due: not if no row of the warp has a new maximum, where kSkip asks for that first.
template <typename Tr>
__device__ __forceinline__ bool raise_references(const float (&s)[Tr::kBlockKeys / 2], RowState& rows, float scale_log2,
                                                 float (&factor)[2]) {
  const int32_t bits[2] = {largest_bits(s, 0), largest_bits(s, 1)};
  // Behind a reference that is not negative it is no matter which of the negative logits that is.
  const int32_t negative =
      Tr::kSkip ? (bits[0] & rows.limit_bits[0]) | (bits[1] & rows.limit_bits[1]) : min(bits[0], bits[1]);
  const bool by_float = __any_sync(0xffffffff, negative < 0);  // where all are negative the order is the other one
  if constexpr (Tr::kSkip) {
    if (!__any_sync(0xffffffff, bits[0] >= rows.limit_bits[0] || bits[1] >= rows.limit_bits[1])) return false;
  }
  float largest[2] = {__int_as_float(bits[0]), __int_as_float(bits[1])};
  if (by_float) {
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = largest_float(s, i);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float reference = fmaxf(rows.reference[i], quad_max(largest[i]));
    factor[i] = exp2_fast((rows.reference[i] - reference) * scale_log2);  // 1 where the maximum is an old one
    rows.sum[i] *= factor[i];
    rows.reference[i] = reference;
    if constexpr (Tr::kSkip) {
      if (rows.limit_bits[i] < INT_MAX) rows.limit_bits[i] = reference >= 0.0f ? __float_as_int(reference) : INT_MIN;
    }
  }
  return true;
}

template <typename Tr>
__device__ __forceinline__ void multiply_rows(float (&o)[Tr::kHeadDim / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < Tr::kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
}

// x, but not before y is known.
__device__ __forceinline__ float behind(float x, uint32_t y) {
  uint32_t z;
  asm("lop3.b32 %0, %1, %2, %3, 0xf8;"  // x | (y & 0), of which ptxas does not know that it is 0
      : "=r"(z)
      : "r"(__float_as_uint(x)), "r"(y), "r"(blockIdx.y));
  return __uint_as_float(z);
}

// P relative to the references, in place of S, packed for P V, and its sums; O * factor. An exponential takes eight
// cycles of which its warp needs one: sums, packing and products fit between them. ptxas leaves the latter two for the
// end; so the next group's exponentials hang on the last group's packing and on products of this one.
template <typename Tr, bool kMultiply>
__device__ __forceinline__ void exponentials_between(float (&s)[Tr::kBlockKeys / 2], RowState& rows, float scale_log2,
                                                     uint32_t (&probabilities)[Tr::kBlockKeys / 4],
                                                     float (&o)[Tr::kHeadDim / 2], const float (&factor)[2]) {
  constexpr int kWords = 4, kGroups = Tr::kBlockKeys / 4 / kWords, kProducts = Tr::kHeadDim / 2 / kGroups;
  float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
  float offset[2] = {rows.reference[0] * scale_log2, rows.reference[1] * scale_log2};
  const auto pack = [&](int group) {
#pragma unroll
    for (int j = group * kWords; j < (group + 1) * kWords; ++j) {
      probabilities[j] = pack2<typename Tr::T>(s[2 * j], s[2 * j + 1]);
    }
  };
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int j = group * kWords; j < (group + 1) * kWords; ++j) {
      const int i = j % 2;
      s[2 * j] = exp2_fast(fmaf(s[2 * j], scale_log2, -offset[i]));
      s[2 * j + 1] = exp2_fast(fmaf(s[2 * j + 1], scale_log2, -offset[i]));
      even[i] += s[2 * j];
      odd[i] += s[2 * j + 1];
    }
    if (kMultiply) {
#pragma unroll
      for (int k = group * kProducts; k < (group + 1) * kProducts; ++k) o[k] *= factor[k / 2 % 2];
      offset[1] = behind(offset[1], __float_as_uint(o[(group + 1) * kProducts - 1]));
    }
    if (group > 0) {
      pack(group - 1);
      offset[0] = behind(offset[0], probabilities[group * kWords - 1]);
    }
  }
  pack(kGroups - 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) rows.sum[i] += even[i] + odd[i];
}

// The same beside other registers of S and P, without O.
template <typename Tr>
__device__ __forceinline__ void exponentials(const float (&s)[Tr::kBlockKeys / 2], RowState& rows, float scale_log2,
                                             uint32_t (&probabilities)[Tr::kBlockKeys / 4]) {
  float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
  const float offset[2] = {rows.reference[0] * scale_log2, rows.reference[1] * scale_log2};
#pragma unroll
  for (int j = 0; j < Tr::kBlockKeys / 4; ++j) {
    const int i = j % 2;
    const float a = exp2_fast(fmaf(s[2 * j], scale_log2, -offset[i]));
    const float b = exp2_fast(fmaf(s[2 * j + 1], scale_log2, -offset[i]));
    even[i] += a;
    odd[i] += b;
    probabilities[j] = pack2<typename Tr::T>(a, b);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) rows.sum[i] += even[i] + odd[i];
}

}  // namespace flashcore::prefill
