// Decode on Hopper, short tiles (up to 16 packed queries, one request's group): mma.sync with swapped operands.
//
// The keys stand on M and the queries on N, so a group of up to 8 heads wastes nothing on padding:
//     S^T (16 keys x 8 queries) = K Q^T,   O^T (16 channels x 8 queries) += V^T P^T.
// Each of the four warps takes 16 keys of every unit of 64 and keeps its own running softmax, so that within a tile no
// warp waits for another; the four shares are added by their LSE at the end of the tile.
#pragma once

#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/math.cuh"
#include "device/mma_sm80.cuh"
#include "device/wgmma.cuh"

namespace flashcore::decode90 {

// Adds the four warps' shares of `queries` queries and writes their rows; lane m holds the output row of query m.
template <typename Traits>
__device__ __forceinline__ void combine_warps(const Scratch<Traits>& scratch, const Params& params, int queries,
                                              bool direct, int32_t out_row, int warp, int lane) {
  constexpr int kQuads = Traits::kHeadDim / 4;
  const AttendParams& p = params.attend;
  for (int first = 32 * warp; first < queries * kQuads; first += kConsumers) {
    const int m = (first + lane) / kQuads;
    const int d = (first + lane) % kQuads * 4;
    const int row = __shfl_sync(~0u, out_row, m);
    if (m >= queries) continue;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) maximum = fmaxf(maximum, scratch.stats[w][m].x);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) {
      const float2 stats = scratch.stats[w][m];
      const float weight = exp2_fast((stats.x - reference) * params.softmax_scale);
      const float4 share = *reinterpret_cast<const float4*>(&scratch.o[w][m][d ^ (8 * (m / 2))]);
      sum += weight * stats.y;
      o.x += weight * share.x;
      o.y += weight * share.y;
      o.z += weight * share.z;
      o.w += weight * share.w;
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    store4<Traits>(p, direct, row, d, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
    if (d == 0) store_lse(p, direct, row, maximum * params.softmax_scale + log2f(sum));
  }
}

// One tile of at most 8 * kN packed queries and at least one key.
template <typename Traits, int kN>
__device__ __forceinline__ void consume_short(SharedStorage<Traits>& shared, const Params& params,
                                              StageRing<Traits>& ring, int warp, int lane) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kSteps = kHeadDim / 16;
  const int quad = lane / 4;  // fragment row: key or channel
  const int pair = lane % 4;  // fragment columns 2 * pair, + 1: queries

  // Queries as B fragments, and what this lane needs of the tile; then the query buffer is free for the next tile.
  uint32_t q[kN][kSteps][2];
  int visible_begin[kN][2], visible_end[kN][2];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t b[4];
      load_matrix_x4(b, shared_address(shared.q[0] + swizzled(8 * n + lane % 8, 2 * step + lane / 8)));
      q[n][step][0] = b[0];
      q[n][step][1] = b[1];
      q[n][step + 1][0] = b[2];
      q[n][step + 1][1] = b[3];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      visible_begin[n][e] = shared.tile.visible_begin[8 * n + 2 * pair + e];
      visible_end[n][e] = shared.tile.visible_end[8 * n + 2 * pair + e];
    }
  }
  const int32_t out_row = shared.tile.out_row[lane];
  const int queries = shared.tile.queries;
  const bool direct = shared.tile.direct;
  const int kv_begin = shared.tile.kv_begin, kv_end = shared.tile.kv_end;
  const int free_begin = shared.tile.free_begin, free_end = shared.tile.free_end;
  mbarrier_arrive(&shared.q_empty);

  float o[kN][kSteps][4] = {};
  float maximum[kN][2], sum[kN][2];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    maximum[n][0] = maximum[n][1] = -INFINITY;
    sum[n][0] = sum[n][1] = 0.0f;
  }
  const uint32_t k_row = swizzled(kWarpKeys * warp + lane % 16, 0) & ~127u;
  const uint32_t v_row = swizzled(kWarpKeys * warp + lane % 8 + lane / 16 * 8, 0) & ~127u;

  for (int key = kv_begin; key < kv_end; key += kUnitKeys) {
    Stage<Traits>& stage = shared.stages[ring.stage];
    mbarrier_wait(&shared.full[ring.stage], ring.parity);

    float s[kN][4] = {}, s_odd[kN][4] = {};  // two chains: the latency of one would show
    const uint32_t k = shared_address(stage.k) + k_row;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrix_x4(a, k + step / 4 * kSlabBytes + ((step % 4 * 2 + lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        mma_m16n8k16<Element>(step % 2 ? s_odd[n] : s[n], a, q[n][step][0], q[n][step][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] += s_odd[n][e];
    }
    if (params.cap_scale != 0.0f) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = tanh_exp2(s[n][e] * params.cap_scale);
      }
    }
    if (key < free_begin || key + kUnitKeys > free_end) {
      const int first = key + kWarpKeys * warp + quad;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = first + e / 2 * 8;
          if (j < visible_begin[n][e % 2] || j >= visible_end[n][e % 2]) s[n][e] = -INFINITY;
        }
      }
      if (key + kUnitKeys > kv_end) {
        zero_values(stage, kv_end - key, kWarpKeys * warp, kWarpKeys * (warp + 1), lane);
      }
    }

    float highest[kN][2];
    bool higher = false;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float h = fmaxf(s[n][e], s[n][e + 2]);
        h = fmaxf(h, __shfl_xor_sync(~0u, h, 4));
        h = fmaxf(h, __shfl_xor_sync(~0u, h, 8));
        h = fmaxf(h, __shfl_xor_sync(~0u, h, 16));
        highest[n][e] = fmaxf(maximum[n][e], h);
        higher |= highest[n][e] > maximum[n][e];
      }
    }
    uint32_t p[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float reference[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) reference[e] = highest[n][e] == -INFINITY ? 0.0f : highest[n][e];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = exp2_fast(s[n][e] * params.softmax_scale - reference[e % 2] * params.softmax_scale);
      }
      if (__any_sync(~0u, higher)) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // Exactly 1 for a query whose maximum stays, so that no bit of it depends on the other queries of the warp.
          const float decay = exp2_fast((maximum[n][e] - reference[e]) * params.softmax_scale);
          maximum[n][e] = highest[n][e];
          sum[n][e] *= decay;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            o[n][step][e] *= decay;
            o[n][step][e + 2] *= decay;
          }
        }
      }
      sum[n][0] += s[n][0] + s[n][2];
      sum[n][1] += s[n][1] + s[n][3];
      p[n][0] = transpose_matrix(pack2<Element>(s[n][0], s[n][1]));
      p[n][1] = transpose_matrix(pack2<Element>(s[n][2], s[n][3]));
    }

    const uint32_t v = shared_address(stage.v) + v_row;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrix_x4_transposed(a, v + step / 4 * kSlabBytes + ((step % 4 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_m16n8k16<Element>(o[n][step], a, p[n][0], p[n][1]);
    }
    if (key + kUnitKeys < kv_end) {
      release(&shared.empty[ring.stage], lane);
      ring.advance();
    }
  }

#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], 4);
      sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], 8);
      sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], 16);
    }
  }
  // Once every warp is through with the last unit, its stage is the scratch.
  Scratch<Traits>& scratch = shared.stages[ring.stage].scratch;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    named_barrier_sync(kConsumerBarrier, kConsumers);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int m = 2 * pair + e;
      if (quad == 0) scratch.stats[warp][m] = make_float2(maximum[n][e], sum[n][e]);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        scratch.o[warp][m][(16 * step + quad) ^ (8 * pair)] = o[n][step][e];
        scratch.o[warp][m][(16 * step + quad + 8) ^ (8 * pair)] = o[n][step][e + 2];
      }
    }
    named_barrier_sync(kConsumerBarrier, kConsumers);
    combine_warps(scratch, params, min(8, queries - 8 * n), direct, __shfl_sync(~0u, out_row, 8 * n + lane % 8), warp,
                  lane);
  }
  named_barrier_sync(kConsumerBarrier, kConsumers);
  fence_proxy_async();
  release(&shared.empty[ring.stage], lane);
  ring.advance();
}

}  // namespace flashcore::decode90
