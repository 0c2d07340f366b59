// Decode on Hopper, the arithmetic of short tiles: a warp's share of up to 16 packed queries, 16 keys at a time, by
// mma.sync with swapped operands.
//
// The keys stand on M and the queries on N, so a group of up to 8 heads wastes nothing on padding:
//     S^T (16 keys x 8 queries) = K Q^T,   O^T (16 channels x 8 queries) += V^T P^T.
// Each warp keeps its own running softmax, so that within a tile no warp waits for another; the shares are added by
// their LSE at the end of the tile. Two kernels use this, and their results are the same to the bit.
#pragma once

#include "attend/wgmma_sm90_decode_output.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/math.cuh"
#include "device/mma_sm80.cuh"

namespace flashcore::decode90 {

// Four words of each of four neighbouring lanes, transposed: lane l gets word l % 4 of theirs and its own, in their
// order.
__device__ __forceinline__ void transpose_words(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, int lane) {
  const bool high = lane & 2, odd = lane & 1;
  const uint32_t x = __shfl_xor_sync(~0u, high ? a : c, 2), y = __shfl_xor_sync(~0u, high ? b : d, 2);
  const uint32_t even_0 = high ? x : a, odd_0 = high ? y : b;  // of the even and of the odd lane's words, half of the
  const uint32_t even_2 = high ? c : x, odd_2 = high ? d : y;  // lanes' in each
  const uint32_t z = __shfl_xor_sync(~0u, odd ? even_0 : odd_0, 1), w = __shfl_xor_sync(~0u, odd ? even_2 : odd_2, 1);
  a = odd ? z : even_0;
  b = odd ? odd_0 : z;
  c = odd ? w : even_2;
  d = odd ? odd_2 : w;
}

// kN blocks of 8 queries. Lane l holds, with quad = l / 4 and pair = l % 4, channels or keys quad and quad + 8 of a
// fragment, of queries 8 n + 2 pair and 8 n + 2 pair + 1.
template <typename Traits, int kN>
struct ShortTile {
  using Element = typename Traits::Element;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kSteps = kHeadDim / 16;

  uint32_t q[kN][kSteps][2];  // B fragments
  int visible_begin[kN][2], visible_end[kN][2];
  float o[kN][kSteps][4];
  float maximum[kN][2], sum[kN][2];

  // From shared memory, in rows of which four lanes' words are in different banks; lane m holds the offset of query m.
  __device__ __forceinline__ void load_queries(const Element* queries, int64_t offset, int lane) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int64_t from = __shfl_sync(~0u, offset, 8 * n + lane / 4);
      const auto* row = reinterpret_cast<const uint32_t*>(queries + from) + lane % 4;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        q[n][step][0] = row[8 * step];
        q[n][step][1] = row[8 * step + 4];
      }
    }
  }

  // From memory, for place_queries: lane l gets blocks of 8 channels 4 i + l % 4 of its queries. Its words of the
  // fragments are not side by side, and the first keys would wait behind four times as many loads.
  __device__ __forceinline__ void ask_for_queries(const Element* queries, int64_t offset, int lane) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int64_t from = __shfl_sync(~0u, offset, 8 * n + lane / 4);
      const auto* row = reinterpret_cast<const uint4*>(queries + from) + lane % 4;
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        const uint4 block = row[2 * step];
        q[n][step][0] = block.x;
        q[n][step][1] = block.y;
        q[n][step + 1][0] = block.z;
        q[n][step + 1][1] = block.w;
      }
    }
  }
  __device__ __forceinline__ void place_queries(int lane) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        transpose_words(q[n][step][0], q[n][step][1], q[n][step + 1][0], q[n][step + 1][1], lane);
      }
    }
  }

  // Lane m holds the keys [begin, end) that query m sees.
  __device__ __forceinline__ void hide_others(int begin, int end, int lane) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        visible_begin[n][e] = __shfl_sync(~0u, begin, 8 * n + lane % 4 * 2 + e);
        visible_end[n][e] = __shfl_sync(~0u, end, 8 * n + lane % 4 * 2 + e);
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][step][e] = 0.0f;
      }
      maximum[n][0] = maximum[n][1] = -INFINITY;
      sum[n][0] = sum[n][1] = 0.0f;
    }
  }

  // Adds 16 keys: key_rows and value_rows are this lane's rows of them for ldmatrix (lane % 16, and
  // lane % 8 + lane / 16 * 8), slabs of 64 channels kSlabBytes apart, swizzled. `first`: the first key; `masked`: a
  // query may not see all.
  template <int kSlabBytes>
  __device__ __forceinline__ void add_keys(const Params& params, uint32_t key_rows, uint32_t value_rows, int first,
                                           bool masked, int lane) {
    float s[kN][4] = {}, s_odd[kN][4] = {};  // two chains: the latency of one would show
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrix_x4(a, key_rows + step / 4 * kSlabBytes + ((step % 4 * 2 + lane / 16) ^ (lane % 8)) * 16);
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
    if (masked) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = first + lane / 4 + e / 2 * 8;
          if (j < visible_begin[n][e % 2] || j >= visible_end[n][e % 2]) s[n][e] = -INFINITY;
        }
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

#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrix_x4_transposed(a,
                                value_rows + step / 4 * kSlabBytes + ((step % 4 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_m16n8k16<Element>(o[n][step], a, p[n][0], p[n][1]);
    }
  }

  // Behind the last keys: the sums over all lanes.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], 4);
        sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], 8);
        sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], 16);
      }
    }
  }

  // Leaves block n for the other warps.
  __device__ __forceinline__ void leave(Share<kHeadDim>& share, int n, int lane) const {
    const int quad = lane / 4, pair = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int m = 2 * pair + e;
      if (quad == 0) share.stats[m] = make_float2(maximum[n][e], sum[n][e]);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        share.o[m][(16 * step + quad) ^ (8 * pair)] = o[n][step][e];
        share.o[m][(16 * step + quad + 8) ^ (8 * pair)] = o[n][step][e + 2];
      }
    }
  }
};

// Adds the shares of `warps` warps, of which this is number `warp`, and writes the rows of `queries` queries; lane m
// holds the output row of query m. share(w): what warp w has left.
template <typename Traits, int kMostWarps, typename ShareOf, typename Sink>
__device__ __forceinline__ void combine_shares(const ShareOf& share, const Params& params, int queries, bool direct,
                                               int32_t out_row, const Sink& sink, int warp, int warps, int lane) {
  constexpr int kQuads = Traits::kHeadDim / 4;
#pragma unroll 1
  for (int first = 32 * warp; first < queries * kQuads; first += 32 * warps) {
    const int m = (first + lane) / kQuads;
    const int d = (first + lane) % kQuads * 4;
    const int row = __shfl_sync(~0u, out_row, m);
    if (m >= queries) continue;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kMostWarps; ++w) {
      if (w < warps) maximum = fmaxf(maximum, share(w).stats[m].x);
    }
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kMostWarps; ++w) {
      if (w >= warps) break;
      const float2 stats = share(w).stats[m];
      const float weight = exp2_fast((stats.x - reference) * params.softmax_scale);
      const float4 part = *reinterpret_cast<const float4*>(&share(w).o[m][d ^ (8 * (m / 2))]);
      sum += weight * stats.y;
      o.x += weight * part.x;
      o.y += weight * part.y;
      o.z += weight * part.z;
      o.w += weight * part.w;
    }
    const float inverse = inverse_or_zero(sum);
    sink.store4(direct, row, d, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
    if (d == 0) sink.store_lse(direct, row, maximum * params.softmax_scale + log2_fast(sum));
  }
}

}  // namespace flashcore::decode90
