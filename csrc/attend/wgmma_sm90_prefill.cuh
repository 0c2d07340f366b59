// Prefill on Hopper: attention of query tiles over a paged KV cache with wgmma and TMA.
//
// What:  one tile is up to 64 * kConsumers packed queries (tokens x group) of one KV head against keys
//        [kv_begin, kv_end) of its row. O = softmax(Q K^T * sm_scale) V, softmax online in base 2.
// Grid:  one persistent CTA an SM; TileSchedule says which tiles it runs.
// Block: a producer warpgroup (a warp for tiles and Q; two that share the boxes of K and V, one a page) and
//        kConsumers warpgroups of 64 queries.
// Smem:  kQueryBuffers tiles of Q, rings of kStages blocks of K and of V, all under the 128-byte swizzle.
// Maths: a row's largest logit so far is the reference of its softmax, in each block. The matmuls of the consumers take
//        turns, so that one's softmax runs beside the others' products. Within a consumer
//        - at head size 128 S of block n - 1 follows O += P V of block n, and P takes the registers of S: a third
//          consumer fits, and keys come from L2 once for 192 queries;
//        - else (kOverlap) the two products run together, where two consumers have room for S beside P (256, packed
//          rows), or three whose softmax takes longer than their products (64). The last P V of a tile then runs beside
//          the first Q K^T of the next one.
// After: FlashAttention-3 (Shah et al., 2024) for the warp specialisation, the overlap inside a warpgroup and the order
//        between warpgroups; FlashAttention-4 for a rescale that is skipped; FlashInfer (Ye et al., 2025) for CSR rows.
#pragma once

#include <cuda_runtime.h>

#include "attend/wgmma_sm90_prefill_consumer.cuh"
#include "attend/wgmma_sm90_prefill_producer.cuh"

namespace flashcore::prefill {

// --- Kernel ----------------------------------------------------------------------------------------------------------

// A CTA's tiles, which the schedule finds.
template <typename Tr, typename Schedule>
__device__ __forceinline__ void attend_tiles(const AttendParams& p, const Maps& maps) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared<Tr>& smem = *reinterpret_cast<Shared<Tr>*>(shared_bytes);
  if (threadIdx.x == 32) {
    prefetch_tensor_map(&maps.q);
    prefetch_tensor_map(&maps.k);
    prefetch_tensor_map(&maps.v);
  }
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Tr::kConsumers;
    for (int i = 0; i < kJobs; ++i) {
      mbarrier_init(&smem.job_full[i], 1);
      mbarrier_init(&smem.job_done[i], 32 * kLoadWarps + 128 * Tr::kConsumers);  // every thread has read it
    }
    for (int i = 0; i < Tr::kQueryBuffers; ++i) mbarrier_init(&smem.q_full[i], 1);
    for (int i = 0; i < Tr::kStages; ++i) {
      mbarrier_init(&smem.k_full[i], kLoadWarps);
      mbarrier_init(&smem.k_empty[i], kConsumerWarps);
      mbarrier_init(&smem.v_full[i], kLoadWarps);
      mbarrier_init(&smem.v_empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    warpgroup_lower_registers<Tr::kProducerRegisters>();
    if (threadIdx.x < 32) {
      announce_tiles<Tr, Schedule>(p, maps, smem);
    } else if (threadIdx.x < 32 * (1 + kLoadWarps)) {
      load_keys<Tr>(p, maps, smem);
    }
  } else {
    warpgroup_raise_registers<Tr::kConsumerRegisters>();
    consume<Tr>(p, smem);
  }
  __syncthreads();  // nobody leaves while barriers are in use
}

template <typename Tr>
__global__ void __launch_bounds__(Tr::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Maps maps) {
  attend_tiles<Tr, TileSchedule>(p, maps);
}

// --- Launcher --------------------------------------------------------------------------------------------------------

template <typename Tr>
cudaError_t make_maps(Maps& maps, const AttendParams& p) {
  const int group = p.num_qo_heads / p.num_kv_heads;
  maps.box_keys = p.page_size % 64 == 0 && Tr::kBlockKeys % 64 == 0   ? 64
                  : p.page_size % 32 == 0 && Tr::kBlockKeys % 32 == 0 ? 32
                  : p.page_size % 16 == 0                             ? 16
                  : p.page_size % 8 == 0                              ? 8
                                                                      : 0;
  maps.by_page = Divisor(p.page_size);
  if (maps.box_keys == 0 || p.plan.rows_per_tile > Tr::kRows) return cudaErrorNotSupported;

  const Queries queries{p.q,   p.dtype,      p.head_dim,       p.num_kv_heads,
                        group, p.num_tokens, p.q_stride_token, p.q_stride_head};
  cudaError_t error = make_query_map(&maps.q, queries, Tr::kRows / group);
  if (error == cudaSuccess) error = make_query_map(&maps.q_token, queries, 1);
  if (error == cudaSuccess) error = make_cache_maps(&maps.k, &maps.v, p, maps.box_keys, 1);
  return error;
}

template <typename Tr>
cudaError_t launch(const AttendParams& p) {
  Maps maps;
  cudaError_t error = make_maps<Tr>(maps, p);
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = sizeof(Shared<Tr>);
  error = cudaFuncSetAttribute(prefill_kernel<Tr>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  prefill_kernel<Tr><<<p.num_sms, Tr::kThreads, kSharedBytes, static_cast<cudaStream_t>(p.stream)>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace flashcore::prefill
