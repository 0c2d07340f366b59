// wgmma_sm90, decode: exact attention of few query tokens a request over a paged KV cache, at the memory limit of
// Hopper.
//
// Method: split-KV flash decoding (FlashDecoding; Stream-K for the cuts) over the planner's flat list of tiles, online
// softmax in base 2:  m' = max(m, s), l' = l 2^(m - m') + sum 2^(s - m'), O' = O 2^(m - m') + P V;  out = O / l.
//
// Grid   persistent CTAs, two to an SM. Range r of the plan's num_ctas ranges is tiles cta_indptr[r] .. cta_indptr[r +
// 1];
//        CTAs begin with one each and draw the others as they get free. One launch serves tiles of few packed queries
//        (one request's group) and of many (requests that share pages).
// Block  256 threads: a warpgroup of consumers; one warp that keeps a ring of KV stages full by TMA, one box a page,
// and
//        runs ahead across tiles; one warp that fetches the next tile's queries; two that leave.
// Shared stages of 64 keys (K and V, 128-byte swizzle: both ldmatrix and wgmma read it as it lands), the queries of one
//        tile (the consumers take them to registers at once, so one buffer is enough), what is to know of the tile.
#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode_producer.cuh"
#include "attend/wgmma_sm90_decode_short.cuh"
#include "attend/wgmma_sm90_decode_tall.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/dependent_launch.cuh"

namespace flashcore {
namespace decode90 {

template <typename Traits, int kCtasPerSm>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    attend_decode_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                         const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(storage);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  const FirstRange first(params.attend.plan);
  allow_dependents();  // the merge gets ready in the slots of the CTAs that end first
  if (warp == kConsumerWarps + 2) prefetch_metadata(params.attend, lane);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
    for (int i = 0; i < Traits::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kConsumerWarps);
    }
    mbarrier_init(&shared.q_full, 1);
    mbarrier_init(&shared.q_empty, kConsumerWarps);
    for (int i = 0; i < kRangeSlots; ++i) {
      mbarrier_init(&shared.range_full[i], 1);
      mbarrier_init(&shared.range_empty[i], 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= kConsumerWarps) {
    warpgroup_lower_registers<56>();
    if (warp == kConsumerWarps) {
      produce_kv(shared, k_map, v_map, params, first, lane);
    } else if (warp == kConsumerWarps + 1) {
      produce_queries(shared, params, lane);
    }
  } else {
    warpgroup_raise_registers<200>();
    StageRing<Traits> ring;
    for (uint32_t parity = 0;; parity ^= 1) {
      mbarrier_wait(&shared.q_full, parity);
      const int queries = shared.tile.queries;
      if (queries == kNoMoreTiles) break;
      if (shared.tile.kv_begin == shared.tile.kv_end) {
        write_empty<Traits>(shared.tile, params.attend, warp, lane);
        release(&shared.q_empty, lane);
      } else if (queries <= 8) {
        consume_short<Traits, 1>(shared, params, ring, warp, lane);
      } else if (queries <= kShortQueries) {
        consume_short<Traits, 2>(shared, params, ring, warp, lane);
      } else {
        consume_tall<Traits>(shared, params, ring, warp, lane);
      }
    }
  }
}

template <typename Traits, int kCtasPerSm>
cudaError_t launch(const CUtensorMap& k_map, const CUtensorMap& v_map, const Params& params) {
  const auto kernel = attend_decode_kernel<Traits, kCtasPerSm>;
  constexpr int kShared = sizeof(SharedStorage<Traits>);
  static_assert(kCtasPerSm * (kShared + 1024) <= 228 * 1024, "the stages do not fit");
  static const cudaError_t opt_in = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (opt_in != cudaSuccess) return opt_in;
  const AttendParams& p = params.attend;
  const int resident = kCtasPerSm * p.num_sms;
  const int num_ctas = p.plan.num_ctas < resident ? p.plan.num_ctas : resident;
  kernel<<<num_ctas, kThreads, kShared, static_cast<cudaStream_t>(p.stream)>>>(k_map, v_map, params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch(const CUtensorMap& k_map, const CUtensorMap& v_map, const Params& params) {
  const bool two_per_sm = params.attend.plan.num_ctas > params.attend.num_sms;
  if (params.attend.head_dim == 64) {
    return two_per_sm ? launch<Traits<T, 64, 6>, 2>(k_map, v_map, params)
                      : launch<Traits<T, 64, 12>, 1>(k_map, v_map, params);
  }
  return two_per_sm ? launch<Traits<T, 128, 3>, 2>(k_map, v_map, params)
                    : launch<Traits<T, 128, 6>, 1>(k_map, v_map, params);
}

}  // namespace decode90

// Head dims 64 and 128, bf16 and fp16, pages of 16, 32, 64, 128, ... keys (a power of two), at most 64 packed queries a
// tile. Anything else: cudaErrorInvalidValue.
int run_attend_wgmma_sm90_decode(const AttendParams& p) {
  using namespace decode90;
  const bool known_page = p.page_size >= 16 && (p.page_size & (p.page_size - 1)) == 0;
  const bool known_dtype = p.dtype == DType::bf16 || p.dtype == DType::fp16;
  if (!known_page || !known_dtype || (p.head_dim != 64 && p.head_dim != 128) || p.sm_scale <= 0.0f ||
      p.plan.rows_per_tile > kMaxQueries) {
    return cudaErrorInvalidValue;
  }
  Params params{};
  params.attend = p;
  params.next_range = p.plan.counts + kNumCounts - 1;
  params.group = p.num_qo_heads / p.num_kv_heads;
  const int64_t page_bytes = int64_t{4} * p.page_size * p.num_kv_heads * p.head_dim;  // K and V of all heads
  params.few_pages = static_cast<int32_t>(kSmallBytes / page_bytes);
  while ((1 << params.page_shift) < p.page_size) ++params.page_shift;
  params.box_tokens = p.page_size < kUnitKeys ? p.page_size : kUnitKeys;
  params.box_slabs = params.box_tokens == kUnitKeys ? p.head_dim / kSlab : 1;
  const bool capped = p.logits_soft_cap > 0.0f;
  params.softmax_scale = kLog2E * (capped ? p.logits_soft_cap : p.sm_scale);
  params.cap_scale = capped ? p.sm_scale / p.logits_soft_cap : 0.0f;

  CUtensorMap k_map, v_map;
  PagedCache cache{p.k,         p.dtype,         p.head_dim,       p.page_size,    p.num_kv_heads,
                   p.num_pages, p.k_stride_page, p.k_stride_token, p.k_stride_head};
  cudaError_t error = make_cache_map(&k_map, cache, params.box_tokens, params.box_slabs);
  if (error != cudaSuccess) return error;
  cache.base = p.v;
  cache.stride_page = p.v_stride_page;
  cache.stride_token = p.v_stride_token;
  cache.stride_head = p.v_stride_head;
  error = make_cache_map(&v_map, cache, params.box_tokens, params.box_slabs);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::bf16 ? dispatch<__nv_bfloat16>(k_map, v_map, params)
                                : dispatch<__half>(k_map, v_map, params);
}

}  // namespace flashcore
