// Attention over a plan with the warp-wide tensor-core instructions of sm_80 (mma.sync), for every GPU since Ampere.
//
// Grid: plan.num_ctas persistent CTAs, CTA c takes tiles cta_indptr[c]..cta_indptr[c + 1]. Block: 4 warps, two to three
// CTAs an SM. Shared memory: a ring of (K, V) stages filled by cp.async, the addresses of the keys to come, one RowInfo
// a query, and Q. Rows of K, V and Q are XOR-swizzled in 16-byte chunks so that ldmatrix meets no bank conflict.
//
//   S = Q K^T;  P = 2^(scale S - m);  O = O 2^(m_old - m) + P V;  l = l 2^(m_old - m) + sum(P);  out = O / l
//
// P never leaves the registers: the accumulators of QK^T, packed to 16 bits, are the A operand of PV. There are two
// shapes of tile:
//   tall   Each warp owns 16 * kMTiles packed queries and walks all keys. With 32 queries a warp, a product reads half
//          as much of K and V from shared memory as with 16, where that bounds the kernel.
//   short  At most 16 packed queries (decode): all warps hold them, each takes its share of the keys of every block,
//          and their (O, m, l) are merged in shared memory at the end.
//
// Keys are found through an address table in shared memory, written one block ahead of the copies that read it, so
// page sizes differ in nothing but the contents of that table.
//
// Method: FlashAttention-2 (Dao, 2023), whose rescale of O is left out where no row of a warp has a new maximum.
#pragma once

#include <cuda_runtime.h>

#include "attend/wmma_sm80_math.cuh"
#include "attend/wmma_sm80_stream.cuh"
#include "attend/wmma_sm80_tile.cuh"
#include "device/dependent_launch.cuh"
#include "params.h"

namespace flashcore::wmma_sm80 {

// ------------------------------------------------------------------------------------------ output

// Stores elements dim, dim + 1 for dim = first, first + step, ... of packed query m; value(i) gives the i-th pair.
template <class Traits, int kPairs, typename Value>
__device__ __forceinline__ void store_row(const AttendParams& p, const Work& work, int m, int out_row, int first,
                                          int step, Value&& value) {
  if (work.tile.partial >= 0) {
    float* out = p.partial_o + int64_t{work.tile.partial + m} * Traits::kHeadDim + first;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) *reinterpret_cast<float2*>(out + i * step) = value(i);
  } else {
    auto* out = static_cast<typename Traits::Element*>(p.out) + int64_t{out_row} * Traits::kHeadDim + first;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 pair = value(i);
      *reinterpret_cast<uint32_t*>(out + i * step) = pack2<typename Traits::Element>(pair.x, pair.y);
    }
  }
}

// A query that saw no key has sum 0: out 0, lse -inf.
__device__ __forceinline__ void store_lse(const AttendParams& p, const Work& work, int m, int out_row, float max,
                                          float sum) {
  const float lse = sum > 0.0f ? max + log2f(sum) : -INFINITY;
  if (work.tile.partial >= 0) {
    p.partial_lse[work.tile.partial + m] = lse;
  } else if (p.lse != nullptr) {
    p.lse[out_row] = lse;
  }
}

// ------------------------------------------------------------------------------------------ kernel

template <class Traits>
__device__ __forceinline__ void attend_tall(const AttendParams& p, const Work& work, SharedMemory<Traits>& shared,
                                            Work* next, int next_index) {
  using Element = typename Traits::Element;
  constexpr int kDim = Traits::kHeadDim, kM = Traits::kMTiles, kKeys = Traits::kTallKeys, kWarpRows = 16 * kM;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  using Keys = KeyStream<Element, kDim, kKeys, Traits::kTallStages>;
  const Keys keys(p, work, shared.ring, shared.addresses);
  if (threadIdx.x < Traits::kRows) shared.rows[threadIdx.x] = describe_row(p, work, threadIdx.x);
  __syncthreads();

  const uint32_t q_tile = shared_address(shared.ring) + Traits::kRingBytes - Traits::kQBytes;
  if (work.tile.kv_begin < work.tile.kv_end) {  // Q travels with the first block
    SwizzledTile<kDim>::template for_each_chunk<Traits::kRows>([&](int row, int chunk) {
      const int64_t from = shared.rows[row].q_offset;
      const auto* q = static_cast<const Element*>(p.q) + (from < 0 ? 0 : from + chunk * 8);
      copy_async_16<kDim * 2>(q_tile + SwizzledTile<kDim>::offset(row, chunk), q, from >= 0);
    });
  }
  keys.start();
  if (next != nullptr && threadIdx.x == 0) *next = read_work(p, next_index);

  const RowInfo* rows = shared.rows + warp * kWarpRows;
  const WarpVisible<kWarpRows> visible(p, work, rows);
  const FragmentPointer<kDim> q_pointer(lane % 16, lane / 16);  // V's too
  const FragmentPointer<kDim> k_pointer(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t q_warp = q_tile + warp * kWarpRows * SwizzledTile<kDim>::kRowBytes;
  const float scale = softmax_scale(p);

  uint32_t q_registers[Traits::kQInRegisters ? kDim / 16 : 1][kM][4];
  auto load_q = [&](uint32_t (&q)[kM][4], int dim) {
#pragma unroll
    for (int i = 0; i < kM; ++i) load_matrix_x4(q[i], q_pointer.at(q_warp, 16 * i, dim));
  };
  auto take_q = [&](uint32_t (&q)[kM][4], int dim) {
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) q[i][e] = q_registers[dim / 16][i][e];
      }
    } else {
      load_q(q, dim);
    }
  };

  Accumulator<kM, kDim / 8> result;
  keys.for_each_block([&](int key, uint32_t block) {
    if constexpr (Traits::kQInRegisters) {
      if (key == work.tile.kv_begin) {
#pragma unroll
        for (int dim = 0; dim < kDim; dim += 16) load_q(q_registers[dim / 16], dim);
      }
    }
    if (visible.skips(key, key + kKeys)) return;
    float s[kM][kKeys / 8][4];
    multiply_qk<Traits>(s, take_q, k_pointer, block);
    shape_logits(p, work, rows, key, visible.masks(key, key + kKeys), s);
    result.weigh(s, scale);
    multiply_pv<Traits>(result.o, s, q_pointer, block + Keys::kVOffset);
  });

  result.finish();
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * i + 8 * r + lane / 4, m = warp * kWarpRows + row;
      if (m >= work.num_rows) continue;
      const int out_row = rows[row].out_row;
      const float sum = result.sum[i][r], normalise = sum > 0.0f ? 1.0f / sum : 0.0f;
      store_row<Traits, kDim / 8>(p, work, m, out_row, 2 * (lane % 4), 8, [&](int n) {
        return make_float2(result.o[i][n][2 * r] * normalise, result.o[i][n][2 * r + 1] * normalise);
      });
      if (lane % 4 == 0) store_lse(p, work, m, out_row, result.max[i][r], sum);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void attend_short(const AttendParams& p, const Work& work, SharedMemory<Traits>& shared,
                                             Work* next, int next_index) {
  using Element = typename Traits::Element;
  constexpr int kDim = Traits::kHeadDim, kWarpDims = kDim / Traits::kDimWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kWarpKeys = Traits::kShortKeys / Traits::kKeyWarps;
  const int warp_key = warp % Traits::kKeyWarps * kWarpKeys, dim_begin = warp / Traits::kKeyWarps * kWarpDims;

  using Keys = KeyStream<Element, kDim, Traits::kShortKeys, Traits::kShortStages>;
  const Keys keys(p, work, shared.ring, shared.addresses);
  if (threadIdx.x < kShortRows) shared.rows[threadIdx.x] = describe_row(p, work, threadIdx.x);
  __syncthreads();
  keys.start();
  if (next != nullptr && threadIdx.x == 0) *next = read_work(p, next_index);

  // Q is read once and is small: it goes straight to the registers of the A operand.
  uint32_t q_registers[kDim / 16][1][4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int64_t from = shared.rows[lane / 4 + e % 2 * 8].q_offset;
    const auto* q = reinterpret_cast<const uint32_t*>(static_cast<const Element*>(p.q) + max(from, int64_t{0}));
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      q_registers[i][0][e] = from < 0 ? 0 : q[8 * i + e / 2 * 4 + lane % 4];
    }
  }
  auto take_q = [&](uint32_t (&q)[1][4], int dim) {
#pragma unroll
    for (int e = 0; e < 4; ++e) q[0][e] = q_registers[dim / 16][0][e];
  };

  const WarpVisible<kShortRows> visible(p, work, shared.rows);
  const FragmentPointer<kDim> k_pointer(warp_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const FragmentPointer<kDim> v_pointer(warp_key + lane % 16, dim_begin / 8 + lane / 16);
  const float scale = softmax_scale(p);

  Accumulator<1, kWarpDims / 8> result;
  keys.for_each_block([&](int key, uint32_t block) {
    key += warp_key;
    if (visible.skips(key, key + kWarpKeys)) return;
    float s[1][kWarpKeys / 8][4];
    multiply_qk<Traits>(s, take_q, k_pointer, block);
    shape_logits(p, work, shared.rows, key, visible.masks(key, key + kWarpKeys), s);
    result.weigh(s, scale);
    multiply_pv<Traits>(result.o, s, v_pointer, block + Keys::kVOffset);
  });

  result.finish();
  auto& results = *reinterpret_cast<WarpResults<Traits>*>(shared.ring);
  static_assert(sizeof(results) <= Traits::kRingBytes);
  __syncthreads();  // every warp is done with the ring
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = 8 * r + lane / 4;
#pragma unroll
    for (int n = 0; n < kWarpDims / 8; ++n) {
      *reinterpret_cast<float2*>(&results.o[warp_key / kWarpKeys][m][dim_begin + 8 * n + 2 * (lane % 4)]) =
          make_float2(result.o[0][n][2 * r], result.o[0][n][2 * r + 1]);
    }
    if (dim_begin == 0 && lane % 4 == 0) {
      results.max[warp_key / kWarpKeys][m] = result.max[0][r];
      results.sum[warp_key / kWarpKeys][m] = result.sum[0][r];
    }
  }
  __syncthreads();

  constexpr int kRowThreads = kThreads / kShortRows;
  const int m = threadIdx.x / kRowThreads;
  if (m >= work.num_rows) return;
  float top = results.max[0][m], sum = 0.0f, factor[Traits::kKeyWarps];
#pragma unroll
  for (int w = 1; w < Traits::kKeyWarps; ++w) top = fmaxf(top, results.max[w][m]);
#pragma unroll
  for (int w = 0; w < Traits::kKeyWarps; ++w) {
    factor[w] = exp2_fast(results.max[w][m] - top);
    sum += factor[w] * results.sum[w][m];
  }
  const int out_row = shared.rows[m].out_row;
  const float normalise = sum > 0.0f ? 1.0f / sum : 0.0f;
  const int first_dim = 2 * (threadIdx.x % kRowThreads);
  store_row<Traits, kDim / (2 * kRowThreads)>(p, work, m, out_row, first_dim, 2 * kRowThreads, [&](int i) {
    float2 pair = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < Traits::kKeyWarps; ++w) {
      const float2 o = *reinterpret_cast<const float2*>(&results.o[w][m][first_dim + i * 2 * kRowThreads]);
      pair.x += factor[w] * o.x;
      pair.y += factor[w] * o.y;
    }
    return make_float2(pair.x * normalise, pair.y * normalise);
  });
  if (threadIdx.x % kRowThreads == 0) store_lse(p, work, m, out_row, top, sum);
}

template <class Traits>
__global__ void __launch_bounds__(kThreads, Traits::kCtasPerSm) attend_kernel(const __grid_constant__ AttendParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedMemory<Traits>*>(memory);
  allow_dependents();  // the merge reads the plan while the last tiles run
  int index = p.plan.cta_indptr[blockIdx.x];
  const int end = p.plan.cta_indptr[blockIdx.x + 1];
  if (threadIdx.x == 0 && index < end) shared.work[index % 2] = read_work(p, index);
  // With fixed splits what becomes of a prompt's token must not hang on where the prompt is cut into chunks, and so on
  // how many others are in its tile.
  const bool may_be_short = p.decode || p.free_cuts;
  for (; index < end; ++index) {
    __syncthreads();  // the tile before is done with shared memory, and `work` has arrived
    const Work& work = shared.work[index % 2];
    Work* next = index + 1 < end ? &shared.work[(index + 1) % 2] : nullptr;
    if (may_be_short && work.num_rows <= kShortRows) {
      attend_short<Traits>(p, work, shared, next, index + 1);
    } else {
      attend_tall<Traits>(p, work, shared, next, index + 1);
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <class Traits>
int launch(const AttendParams& p) {
  constexpr int kBytes = sizeof(SharedMemory<Traits>);
  const auto kernel = attend_kernel<Traits>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<p.plan.num_ctas, kThreads, kBytes, static_cast<cudaStream_t>(p.stream)>>>(p);
  return cudaGetLastError();
}

template <typename Element, int kHeadDim>
int launch_rows(const AttendParams& p) {
  if (p.plan.rows_per_tile <= 64) return launch<Traits<Element, kHeadDim, 1>>(p);
  if constexpr (kHeadDim <= 128) {  // 32 queries x 256 dims would need every register of a warp for O alone
    if (p.plan.rows_per_tile <= 128) return launch<Traits<Element, kHeadDim, 2>>(p);
  }
  return cudaErrorInvalidValue;
}

// Instantiated in one file a head size, wmma_sm80_d*.cu.
template <int kHeadDim>
int run(const AttendParams& p) {
  if (p.dtype == DType::bf16) return launch_rows<__nv_bfloat16, kHeadDim>(p);
  if (p.dtype == DType::fp16) return launch_rows<__half, kHeadDim>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flashcore::wmma_sm80
