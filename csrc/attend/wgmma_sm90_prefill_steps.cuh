// The steps of a consumer warpgroup of the Hopper prefill kernel but for the softmax: the two matmuls, where a tile's
// rows are, output.
#pragma once

#include <climits>

#include "attend/wgmma_sm90_prefill_softmax.cuh"
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
