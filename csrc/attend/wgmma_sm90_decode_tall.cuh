// Decode on Hopper, tall tiles (17 packed queries and more: requests that share pages): wgmma, one warpgroup.
//
//     S (64 queries x 64 keys) = Q K^T with Q from shared memory,   O (64 x head_dim) += P V with P in registers,
// for one block of 64 queries, or for two over the same stage. Shared pages come from L2 for all rows but one, and L2
// gives an SM a stage in about 0.75 us, which is the time of two blocks on the tensor cores; the other CTA of the SM
// keeps these busy while this one is in its softmax.
#pragma once

#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/math.cuh"
#include "device/mma_sm80.cuh"
#include "device/wgmma.cuh"

namespace flashcore::decode90 {

// The running softmax of a block: this lane holds rows lane / 4 and lane / 4 + 8 of its warp's 16.
template <typename Traits>
struct Block {
  static constexpr int kHeadDim = Traits::kHeadDim;
  float o[kHeadDim / 2];
  float maximum[2], sum[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : o) x = 0.0f;
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // S of a unit.
  static __device__ __forceinline__ void scores(float (&s)[kUnitKeys / 2], const uint8_t* q_block,
                                                const Stage<Traits>& stage) {
    const uint64_t q = wgmma_descriptor(q_block);
    const uint64_t k = wgmma_descriptor(stage.k);
    wgmma_pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t advance = step / 4 * kSlabBytes + step % 4 * 32;
      Wgmma<kUnitKeys, typename Traits::Element>::template ss<0, 0>(s, wgmma_advance(q, advance),
                                                                    wgmma_advance(k, advance), step != 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
  }

  // Takes in S, already masked, and the unit's values.
  __device__ __forceinline__ void add(float (&s)[kUnitKeys / 2], const Stage<Traits>& stage, float softmax_scale) {
    float reference[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float highest = maximum[row];
#pragma unroll
      for (int i = 0; i < kUnitKeys / 8; ++i) {
        highest = fmaxf(highest, fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      reference[row] = highest == -INFINITY ? 0.0f : highest;
      const float decay = exp2_fast((maximum[row] - reference[row]) * softmax_scale);
      maximum[row] = highest;
      reference[row] *= softmax_scale;
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
      s[i] = exp2_fast(s[i] * softmax_scale - reference[row]);
      s[i + 1] = exp2_fast(s[i + 1] * softmax_scale - reference[row]);
      sum[row] += s[i] + s[i + 1];
      p[i / 8][i % 8 / 2] = pack2<typename Traits::Element>(s[i], s[i + 1]);
    }
    const uint64_t v = wgmma_descriptor(stage.v, kSlabBytes);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kUnitKeys / 16; ++step) {
      Wgmma<kHeadDim, typename Traits::Element>::template rs<1>(o, p[step], wgmma_advance(v, step * 16 * 128), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(o);
  }
};

// One tile of at most 64 * kBlocks packed queries and at least one key. The queries and what is to know of the tile
// stay in shared memory until its end.
template <typename Traits, int kBlocks>
__device__ __forceinline__ void consume_tall(SharedStorage<Traits>& shared, const Params& params,
                                             StageRing<Traits>& ring, int warp, int lane) {
  const TileInfo<Traits>& tile = shared.tile;
  const int pair = lane % 4;
  const int first_row = 16 * warp + lane / 4;  // of a block; the other row is 8 below
  const int kv_end = tile.kv_end;
  const int free_begin = tile.free_begin, free_end = tile.free_end;

  Block<Traits> blocks[kBlocks];
#pragma unroll
  for (auto& block : blocks) block.clear();

  for (int key = tile.kv_begin; key < kv_end; key += kUnitKeys) {
    Stage<Traits>& stage = shared.stages[ring.stage];
    mbarrier_wait(&shared.full[ring.stage], ring.parity);
    if (key + kUnitKeys > kv_end) {
      zero_values(stage, kv_end - key, kWarpKeys * warp, kWarpKeys * (warp + 1), lane);
      named_barrier_sync(kConsumerBarrier, kConsumers);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float s[kUnitKeys / 2];
      Block<Traits>::scores(s, shared.q[b], stage);
      if (params.cap_scale != 0.0f) {
#pragma unroll
        for (float& x : s) x = tanh_exp2(x * params.cap_scale);
      }
      if (key < free_begin || key + kUnitKeys > free_end) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int m = kBlockQueries * b + first_row + 8 * row;
          const int begin = tile.visible_begin[m] - key, end = tile.visible_end[m] - key;
#pragma unroll
          for (int i = 0; i < kUnitKeys / 8; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int j = 8 * i + 2 * pair + e;
              if (j < begin || j >= end) s[4 * i + 2 * row + e] = -INFINITY;
            }
          }
        }
      }
      blocks[b].add(s, stage, params.softmax_scale);
    }
    release(&shared.empty[ring.stage], lane);
    ring.advance();
  }

  const bool direct = tile.direct;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Block<Traits>& block = blocks[b];
      float sum = block.sum[row];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int m = kBlockQueries * b + first_row + 8 * row;
      if (m >= tile.queries) continue;
      const int out_row = tile.out_row[m];
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
      for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
        store2<Traits>(params.attend, direct, out_row, 8 * i + 2 * pair, block.o[4 * i + 2 * row] * inverse,
                       block.o[4 * i + 2 * row + 1] * inverse);
      }
      if (pair == 0) {
        store_lse(params.attend, direct, out_row, block.maximum[row] * params.softmax_scale + log2f(sum));
      }
    }
  }
  mbarrier_arrive(&shared.q_empty);
}

}  // namespace flashcore::decode90
