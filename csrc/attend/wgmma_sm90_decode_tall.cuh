// Decode on Hopper, tall tiles (17 to 64 packed queries: requests that share pages): wgmma, one warpgroup.
//
//     S (64 queries x 64 keys) = Q K^T with Q from shared memory,   O (64 x head_dim) += P V with P in registers.
// Shared pages come from L2 for all rows but one, so these tiles are bound by arithmetic; the other CTA of the SM keeps
// the tensor cores busy while this one is in its softmax.
#pragma once

#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/math.cuh"
#include "device/mma_sm80.cuh"
#include "device/wgmma.cuh"

namespace flashcore::decode90 {

// One tile of at most 64 packed queries and at least one key.
template <typename Traits>
__device__ __forceinline__ void consume_tall(SharedStorage<Traits>& shared, const Params& params,
                                             StageRing<Traits>& ring, int warp, int lane) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kSteps = kHeadDim / 16;
  constexpr int kTiles = kUnitKeys / 8;  // accumulator tiles of 8 keys
  const int pair = lane % 4;
  const int m = 16 * warp + lane / 4;  // this lane's queries: m and m + 8

  const int visible_begin[2] = {shared.tile.visible_begin[m], shared.tile.visible_begin[m + 8]};
  const int visible_end[2] = {shared.tile.visible_end[m], shared.tile.visible_end[m + 8]};
  const int out_row[2] = {shared.tile.out_row[m], shared.tile.out_row[m + 8]};
  const int queries = shared.tile.queries;
  const bool direct = shared.tile.direct;
  const int kv_begin = shared.tile.kv_begin, kv_end = shared.tile.kv_end;
  const int free_begin = shared.tile.free_begin, free_end = shared.tile.free_end;

  float o[kHeadDim / 2] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  for (int key = kv_begin; key < kv_end; key += kUnitKeys) {
    Stage<Traits>& stage = shared.stages[ring.stage];
    mbarrier_wait(&shared.full[ring.stage], ring.parity);

    float s[kUnitKeys / 2];
    const uint64_t q = wgmma_descriptor(shared.q);
    const uint64_t k = wgmma_descriptor(stage.k);
    wgmma_pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t advance = step / 4 * kSlabBytes + step % 4 * 32;
      Wgmma<kUnitKeys, Element>::template ss<0, 0>(s, wgmma_advance(q, advance), wgmma_advance(k, advance), step != 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);

    if (params.cap_scale != 0.0f) {
#pragma unroll
      for (float& x : s) x = tanh_exp2(x * params.cap_scale);
    }
    if (key < free_begin || key + kUnitKeys > free_end) {
#pragma unroll
      for (int i = 0; i < kUnitKeys / 2; ++i) {
        const int j = key + i / 4 * 8 + 2 * pair + i % 2;
        const int row = i % 4 / 2;
        if (j < visible_begin[row] || j >= visible_end[row]) s[i] = -INFINITY;
      }
      if (key + kUnitKeys > kv_end) {
        zero_values(stage, kv_end - key, kWarpKeys * warp, kWarpKeys * (warp + 1), lane);
        named_barrier_sync(kConsumerBarrier, kConsumers);
      }
    }

    float reference[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float highest = maximum[row];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) highest = fmaxf(highest, fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      reference[row] = highest == -INFINITY ? 0.0f : highest * params.softmax_scale;
      const float decay = exp2_fast(maximum[row] * params.softmax_scale - reference[row]);
      maximum[row] = highest;
      sum[row] *= decay;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        o[4 * i + 2 * row] *= decay;
        o[4 * i + 2 * row + 1] *= decay;
      }
    }
    uint32_t p[kUnitKeys / 16][4];
#pragma unroll
    for (int i = 0; i < kUnitKeys / 2; i += 2) {
      const int row = i % 4 / 2;
      s[i] = exp2_fast(s[i] * params.softmax_scale - reference[row]);
      s[i + 1] = exp2_fast(s[i + 1] * params.softmax_scale - reference[row]);
      sum[row] += s[i] + s[i + 1];
      p[i / 8][i % 8 / 2] = pack2<Element>(s[i], s[i + 1]);
    }

    const uint64_t v = wgmma_descriptor(stage.v, kSlabBytes);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kUnitKeys / 16; ++step) {
      Wgmma<kHeadDim, Element>::template rs<1>(o, p[step], wgmma_advance(v, step * 16 * 128), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(o);
    release(&shared.empty[ring.stage], lane);
    ring.advance();
  }
  release(&shared.q_empty, lane);

#pragma unroll
  for (int row = 0; row < 2; ++row) {
    sum[row] += __shfl_xor_sync(~0u, sum[row], 1);
    sum[row] += __shfl_xor_sync(~0u, sum[row], 2);
    if (m + 8 * row >= queries) continue;
    const float inverse = sum[row] > 0.0f ? 1.0f / sum[row] : 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      store2<Traits>(params.attend, direct, out_row[row], 8 * i + 2 * pair, o[4 * i + 2 * row] * inverse,
                     o[4 * i + 2 * row + 1] * inverse);
    }
    if (pair == 0) {
      store_lse(params.attend, direct, out_row[row], maximum[row] * params.softmax_scale + log2f(sum[row]));
    }
  }
}

}  // namespace flashcore::decode90
