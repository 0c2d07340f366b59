// wmma_sm80: a block in registers: QK^T, the shape of the logits, online softmax, PV.
#pragma once

#include "attend/wmma_sm80_tile.cuh"
#include "device/math.cuh"
#include "device/mma_sm80.cuh"

namespace flashcore::wmma_sm80 {

// --------------------------------------------------------------------------------- matrix products

// S = Q K^T for 16 * kM queries and 8 * kS keys; load_q(q, dim) gives the A operand of 16 dims.
template <class Traits, int kM, int kS, typename LoadQ>
__device__ __forceinline__ void multiply_qk(float (&s)[kM][kS][4], LoadQ&& load_q,
                                            const FragmentPointer<Traits::kHeadDim>& pointer, uint32_t k) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kS; ++j) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.0f;
  }
#pragma unroll
  for (int dim = 0; dim < Traits::kHeadDim; dim += 16) {
    uint32_t q[kM][4];
    load_q(q, dim);
#pragma unroll
    for (int j = 0; j < kS; j += 2) {
      uint32_t b[4];
      load_matrix_x4(b, pointer.at(k, 8 * j, dim));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16<typename Traits::Element>(s[i][j], q[i], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(s[i][j + 1], q[i], b[2], b[3]);
      }
    }
  }
}

// O += P V for 8 * kS keys and 8 * kN dims.
template <class Traits, int kM, int kS, int kN>
__device__ __forceinline__ void multiply_pv(float (&o)[kM][kN][4], const float (&s)[kM][kS][4],
                                            const FragmentPointer<Traits::kHeadDim>& pointer, uint32_t v) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int j = 0; j < kS; j += 2) {
    uint32_t weights[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      weights[i][0] = pack2<Element>(s[i][j][0], s[i][j][1]);
      weights[i][1] = pack2<Element>(s[i][j][2], s[i][j][3]);
      weights[i][2] = pack2<Element>(s[i][j + 1][0], s[i][j + 1][1]);
      weights[i][3] = pack2<Element>(s[i][j + 1][2], s[i][j + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, pointer.at(v, 8 * j, 8 * n));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16<Element>(o[i][n], weights[i], b[0], b[1]);
        mma_m16n8k16<Element>(o[i][n + 1], weights[i], b[2], b[3]);
      }
    }
  }
}

// Soft cap and masks: from raw products to what the softmax scales. `rows` are those of the warp, `key` the first key.
template <int kM, int kS>
__device__ __forceinline__ void shape_logits(const AttendParams& p, const Work& work, const RowInfo* rows, int key,
                                             bool masked, float (&s)[kM][kS][4]) {
  const int lane = threadIdx.x % 32;
  if (p.logits_soft_cap > 0.0f) {
    const float inner = p.sm_scale / p.logits_soft_cap;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] = tanh_exp2(s[i][j][e] * inner);
      }
    }
  }
  if (!masked) return;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Visible visible(p, work, rows[16 * i + 8 * r + lane / 4].position);
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = key + 8 * j + 2 * (lane % 4) + e;
          if (at < visible.first || at > visible.last) s[i][j][2 * r + e] = -INFINITY;
        }
      }
    }
  }
}

__device__ __forceinline__ float softmax_scale(const AttendParams& p) {
  return (p.logits_soft_cap > 0.0f ? p.logits_soft_cap : p.sm_scale) * kLog2E;
}

// ---------------------------------------------------------------------------------- online softmax

// O, the running maximum m and this lane's part of the sum l for 16 * kM queries and 8 * kN dims. The largest weight of
// a row is 1, which 16 bits do not round; nothing of a row hangs on the others of its warp.
template <int kM, int kN>
struct Accumulator {
  static constexpr float kLowest = -1e30f;  // finite, so that a query that saw no key yet makes no inf - inf

  float o[kM][kN][4];
  float max[kM][2], sum[kM][2];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0.0f;
      max[i][0] = max[i][1] = kLowest;
      sum[i][0] = sum[i][1] = 0.0f;
    }
  }

  // Turns logits s into weights 2^(scale * s - m) and accounts for them in m, l and O.
  template <int kS>
  __device__ __forceinline__ void weigh(float (&s)[kM][kS][4], float scale) {
    float top[kM][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[i][r] = fmaxf(s[i][0][2 * r], s[i][0][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < kS; ++j) top[i][r] = fmaxf(top[i][r], fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
        grows |= top[i][r] * scale > max[i][r];
      }
    }
    if (__any_sync(~0u, grows)) rescale(top, scale);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale, -max[i][e / 2]));
          sum[i][e / 2] += s[i][j][e];
        }
      }
    }
  }

  // Adds up the lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 1);
        sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 2);
      }
    }
  }

 private:
  __device__ __forceinline__ void rescale(const float (&top)[kM][2], float scale) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float row_top = fmaxf(top[i][r], __shfl_xor_sync(~0u, top[i][r], 1));
        row_top = fmaxf(row_top, __shfl_xor_sync(~0u, row_top, 2));
        const float new_max = fmaxf(max[i][r], row_top * scale);
        const float factor = exp2_fast(max[i][r] - new_max);
        max[i][r] = new_max;
        sum[i][r] *= factor;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          o[i][j][2 * r] *= factor;
          o[i][j][2 * r + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace flashcore::wmma_sm80
