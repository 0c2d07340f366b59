// The steps of a consumer warpgroup of the Hopper prefill kernel: the two matmuls, masks, softmax, output.
#pragma once

#include <climits>

#include "attend/wgmma_sm90_prefill_traits.cuh"
#include "device/math.cuh"
#include "device/wgmma.cuh"

namespace flashcore::prefill {

// S = Q K^T for 64 queries; asynchronous.
template <typename Tr>
__device__ __forceinline__ void issue_qk(float (&s)[Tr::kBlockKeys / 2], uint64_t q, uint64_t k) {
  using Mma = Wgmma<Tr::kBlockKeys, typename Tr::T>;
#pragma unroll
  for (int step = 0; step < Tr::kHeadDim / 16; ++step) {
    const uint64_t a = wgmma_advance(q, step / 4 * Tr::kRows * 128 + step % 4 * 32);
    const uint64_t b = wgmma_advance(k, step / 4 * Tr::kBlockKeys * 128 + step % 4 * 32);
    Mma::template ss<0, 0>(s, a, b, step > 0);
  }
  wgmma_commit();
}

// O += P V, or O = P V; asynchronous.
template <typename Tr>
__device__ __forceinline__ void issue_pv(float (&o)[Tr::kHeadDim / 2], const uint32_t (&p)[Tr::kBlockKeys / 4],
                                         uint64_t v, bool accumulate) {
  using Mma = Wgmma<Tr::kHeadDim, typename Tr::T>;
#pragma unroll
  for (int step = 0; step < Tr::kBlockKeys / 16; ++step) {
    Mma::template rs<1>(o, p + 4 * step, wgmma_advance(v, step * 16 * 128), step > 0 || accumulate);
  }
  wgmma_commit();
}

// The two rows a thread holds: which keys they see, and their running softmax.
struct RowState {
  int32_t first[2], last[2];  // visible keys of the row, inclusive
  float reference[2];         // the logit P is relative to, in units of the raw logits
  int32_t limit_bits[2];      // only a logit whose bits are no less can be a new reference
  float sum[2];               // of this thread's columns
};
constexpr float kNoReference = -1e37f;  // finite, so that no difference is NaN

// Query heads of a KV head. The token of a packed query, query / size, by a multiplication: there are at most 192.
struct Group {
  int size;
  uint32_t reciprocal;
  __device__ __forceinline__ explicit Group(int heads) : size(heads), reciprocal((65536 + heads - 1) / heads) {}
  __device__ __forceinline__ int token(int query) const { return query * reciprocal >> 16; }
};

// Packed query i (0 or 1) of this thread.
__device__ __forceinline__ int query_of(int consumer, int i) {
  return threadIdx.x % 128 / 32 * 16 + consumer * 64 + threadIdx.x % 32 / 4 + 8 * i;
}

// What the thread's rows see of a tile, with nothing seen yet.
__device__ __forceinline__ void locate_rows(const AttendParams& p, const Job& job, int consumer, Group group,
                                            RowState& rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int index = group.token(query_of(consumer, i));
    rows.first[i] = job.kv_begin;
    rows.last[i] = job.kv_end - 1;
    rows.reference[i] = kNoReference;
    rows.limit_bits[i] = index < job.q_count ? INT_MIN : INT_MAX;  // what stands behind the last query is nobody's
    rows.sum[i] = 0.0f;
    if (index < job.q_count && (p.causal || p.window_left >= 0)) {
      const int position =
          job.packed ? p.plan.positions[p.plan.row_tokens[job.q_begin + index]] - job.kv_pos : job.position + index;
      if (p.causal) rows.last[i] = min(rows.last[i], position);
      if (p.window_left >= 0) rows.first[i] = max(rows.first[i], position - p.window_left);
    }
  }
}

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
template <typename Tr, bool kSkip>
__device__ __forceinline__ bool raise_references(const float (&s)[Tr::kBlockKeys / 2], RowState& rows, float scale_log2,
                                                 float (&factor)[2]) {
  const int32_t bits[2] = {largest_bits(s, 0), largest_bits(s, 1)};
  int32_t negative = min(bits[0], bits[1]);
  // Behind a reference that is not negative it is no matter which of the negative logits that is.
  if constexpr (kSkip) negative = (bits[0] & rows.limit_bits[0]) | (bits[1] & rows.limit_bits[1]);
  const bool by_float = __any_sync(0xffffffff, negative < 0);  // where all are negative the order is the other one
  if constexpr (kSkip) {
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
    if constexpr (kSkip) {
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
      if (!kMultiply) offset[1] = behind(offset[1], probabilities[group * kWords - 2]);
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

// Lane q of four holds word q of four columns' chunks; afterwards it holds the four words of chunk q.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t& a = words[bit == 1 ? 2 * pair : pair];
      uint32_t& b = words[bit == 1 ? 2 * pair + 1 : pair + 2];
      const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? a : b, bit);
      (upper ? a : b) = received;
    }
  }
}

// P is 0 for keys beyond the last, but what a page holds there may be NaN, and 0 * NaN is NaN: each consumer writes
// zeros to the rows of V from `tail` to the end of its box before it reads them.
template <typename Tr>
__device__ __forceinline__ void clear_tail(Shared<Tr>& smem, uint32_t use, int tail, int consumer) {
  const int end = min((tail + 63) / 64 * 64, Tr::kBlockKeys);  // boxes are at most 64 keys
  if (tail >= end) return;
  constexpr int kChunks = Tr::kSlabs * 8;  // 16-byte chunks of a key
  const uint32_t stage = stage_of<Tr::kStages>(use);
  mbarrier_wait(&smem.v_full[stage], parity_of<Tr::kStages>(use));
  for (int i = threadIdx.x % 128; i < (end - tail) * kChunks; i += 128) {
    auto& row = smem.v[stage][i / 8 % Tr::kSlabs][tail + i / kChunks];
    reinterpret_cast<uint4*>(row)[i % 8] = uint4{0, 0, 0, 0};
  }
  fence_proxy_async();
  named_barrier_sync(kTailBarrier + consumer, 128);
}

// Where the output of a thread's two rows goes.
struct Output {
  float inverse[2];  // 1 / sum of the row
  int32_t row[2];    // of partial_o when partial, else of out; -1: a packed query beyond the row
  bool partial;
};

__device__ __forceinline__ Output locate_output(const Plan& plan, const Job& job, int consumer, Group group,
                                                int num_qo_heads) {
  Output output;
  output.partial = job.partial >= 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = query_of(consumer, i), index = group.token(query);
    output.row[i] = -1;
    if (index >= job.q_count) continue;
    const int token = job.packed ? plan.row_tokens[job.q_begin + index] : job.q_begin + index;
    output.row[i] = output.partial ? job.partial + query
                                   : token * num_qo_heads + job.kv_head * group.size + query - index * group.size;
  }
  return output;
}

// The sums of the thread's rows are complete: writes the LSE, and keeps what O is to be multiplied with.
__device__ __forceinline__ void finish_rows(const AttendParams& p, const RowState& rows, float softmax_scale,
                                            Output& output) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    output.inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* const lse = output.partial ? p.partial_lse : p.lse;
    if (output.row[i] >= 0 && threadIdx.x % 4 == 0 && lse != nullptr) {
      // Which tile is a CTA's last one, whose LSE another copy of this writes, depends on the other CTAs: both copies
      // must be the same instruction.
      lse[output.row[i]] = sum == 0.0f ? -INFINITY : __fmaf_rn(rows.reference[i], softmax_scale, log2f(sum));
    }
  }
}

template <typename Tr>
__device__ __forceinline__ void write_output(const AttendParams& p, const float (&o)[Tr::kHeadDim / 2],
                                             const Output& output) {
  using T = typename Tr::T;
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = output.inverse[i];
    const bool valid = output.row[i] >= 0;
    const int64_t element = static_cast<int64_t>(output.row[i]) * Tr::kHeadDim;
    if (output.partial) {
      float2* const out = reinterpret_cast<float2*>(p.partial_o + element) + quad;
#pragma unroll
      for (int j = 0; j < Tr::kHeadDim / 8; ++j) {
        if (valid) out[4 * j] = float2{o[4 * j + 2 * i] * inverse, o[4 * j + 2 * i + 1] * inverse};
      }
    } else {
      uint4* const out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + element) + quad;
#pragma unroll
      for (int j = 0; j < Tr::kHeadDim / 32; ++j) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int at = 16 * j + 4 * w + 2 * i;
          words[w] = pack2<T>(o[at] * inverse, o[at + 1] * inverse);
        }
        transpose_quad(words);
        if (valid) out[4 * j] = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

// The output of rows without keys: zeros, and an LSE of -inf.
template <typename Tr>
__device__ __forceinline__ void write_nothing(const AttendParams& p, const Output& output) {
  const int quad = threadIdx.x % 4;
  float* const lse = output.partial ? p.partial_lse : p.lse;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (output.row[i] < 0) continue;
    if (quad == 0 && lse != nullptr) lse[output.row[i]] = -INFINITY;
    const int64_t element = static_cast<int64_t>(output.row[i]) * Tr::kHeadDim;
    const int bytes = Tr::kHeadDim * (output.partial ? sizeof(float) : sizeof(typename Tr::T));
    void* const out = output.partial ? static_cast<void*>(p.partial_o + element)
                                     : static_cast<void*>(static_cast<typename Tr::T*>(p.out) + element);
#pragma unroll 1
    for (int chunk = quad; chunk < bytes / 16; chunk += 4) static_cast<uint4*>(out)[chunk] = uint4{0, 0, 0, 0};
  }
}

}  // namespace flashcore::prefill
