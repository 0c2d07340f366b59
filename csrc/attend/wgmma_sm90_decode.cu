// wgmma_sm90, decode: exact attention of few query tokens a request over a paged KV cache, at the memory limit.
//
// Method: split-KV flash decoding (FlashDecoding; Stream-K for the cuts) over the planner's flat list of tiles, online
// softmax in base 2:  m' = max(m, s), l' = l 2^(m - m') + sum 2^(s - m'), O' = O 2^(m - m') + P V;  out = O / l.
//
// Grid   persistent CTAs, two to an SM. One launch serves tiles of few packed queries (one request's group) and of many
//        (requests that share pages): where there are only the former, a CTA takes its range of the plan; where there
//        are both, half of the CTAs begin with the tall tiles, half with the short ones (Dealer). Steps of many
//        requests have the tall tiles in a kernel of their own (wgmma_sm90_decode_packed.cu), on SMs that this one
//        leaves to it. Behind select it begins while that still runs: the KV warp alone waits for it, before it reads a
//        page list.
// Block  256 threads: a warpgroup of consumers; a warp that keeps a ring of KV stages full by TMA, one box a page, and
//        runs ahead across tiles; a warp that fetches the next tile's queries; two that leave.
// Shared stages of 64 keys (K and V, 128-byte swizzle: ldmatrix and wgmma both read it as it lands), the queries of one
//        tile, what is to know of the tile. 192 KB can be in flight to an SM, 128 KB where tiles hold 128 queries.
//
// Where no pages are shared, and the requests are not that many, a smaller kernel does the same
// (wgmma_sm90_decode_few.cuh): it starts 3 us earlier, its merge 2 us. Steps of up to 32 packed queries are all its
// own, and others where the host knows that nothing is shared. Else the plan decides, on the device: both are launched,
// the smaller one first. Where it works, this one leaves while its last CTAs end (0.2 us); where this one works, that
// one leaves in front (1 to 2 us). Steps of up to 16 packed queries and 8 KV heads have a kernel that merges by itself
// (wgmma_sm90_decode_cluster.cuh); those of up to 32 have that one where nothing is shared, and the smaller one on a
// branch beside it, which leaves or not. One request under policy topk has a kernel that selects its pages, too
// (wgmma_sm90_decode_topk.cuh).
//
// Tried on an H200 (32 query and 8 KV heads of 128, bf16, pages of 64; a plain read of 8 GB: 4.46 to 4.56 TB/s):
// - Short tiles: 16 keys of every unit a warp, S^T = K Q^T with mma.sync. Not wgmma: the tensor cores idle either way,
//   and warps that keep their own softmax never meet within a tile.
// - Two CTAs of 3 stages, one of 6: the same within 1 %; two let one compute while the other waits. 2 stages a CTA: the
//   same on small batches, 1 % slower on large ones.
// - L2 promotion of 256 bytes fetches a neighbour head's half line at 64 channels: 2.8 TB/s, 128 bytes: 3.8.
// - Evict-first on large batches: 3 % slower. On small ones up to 1.5 us faster.
// - Ranges drawn by ticket instead of one share a CTA: nothing where memory is the limit, although SMs of a small GPC
//   end at 74 % of the time (the others then get its bandwidth); 10 to 17 % where prefixes are shared, since the rows
//   that read the same pages then do so at the same time.
// - All heads of a row cut alike and read at the same time, as they stand in memory (Lines, plan/schedule.h): 1 to 3 %.
// - Tall tiles of the same keys side by side in time, and beside short ones: 4 x 128 x 8592 with 8192 shared, 410 to
//   320 us.
// - Tall tiles of 128 queries instead of 64: half the bytes from L2, 12 to 25 % faster where most keys are shared
//   (64 x 36864 with 32768 shared: 400 to 351 us; 4 x 128 x 8448 with 8192: 438 to 340); dense within 1 %.
// - Softmax of a tall block beside P V of the one before: needs 208 registers (with 200 ptxas serialises) and leaves 48
//   to the producers, whose spills are cold: 4 x 128 x 8448 298 to 283 us, but small batches 2 to 8 % slower.
// - A merge within this kernel instead of a second one: about 1 us slower up to 8 requests, 1 to 2 faster at 16.
// - Q of tall tiles in registers: ptxas 13.0 hands these registers to P where both products are 64 x 64.
#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode.h"
#include "attend/wgmma_sm90_decode_producer.cuh"
#include "attend/wgmma_sm90_decode_short.cuh"
#include "attend/wgmma_sm90_decode_tall.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/dependent_launch.cuh"
#include "device/side_stream.h"

namespace flashcore {
namespace decode90 {

template <typename Traits, int kCtasPerSm>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    attend_decode_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                         const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(storage);
  // Before all else: a kernel that has stored to local memory, a spilled register, is waited for 2.5 us longer.
  if (params.serves == Serves::sharing && load_kept(params.attend.plan.counts + kRowsPacked) == 0) {
    allow_dependents();
    return wait_in_one_cta();
  }
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  const FirstRange first(params.attend.plan);
  if constexpr (Traits::kApart) {
    if (first.rows_packed > 0 && ApartDealer::leaves(params.attend)) {
      allow_dependents();
      if (threadIdx.x == 0) ApartDealer::retire(params.attend.plan);
      return wait_in_one_cta();
    }
    if (threadIdx.x == 0) shared.first = ApartDealer(params.attend, first).first(first);
  }
  TileWindow guess(params.attend.plan);
  if (warp == kConsumerWarps) guess.load_guess(lane);
  allow_dependents();  // the merge gets ready in the slots of the CTAs that end first
  if (warp == kConsumerWarps + 2) prefetch_metadata(params.attend, lane);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
    for (int i = 0; i < Traits::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kConsumerWarps);
    }
    // Once a tile or less: every thread arrives for itself. Stages: a warp's accesses, then one arrival.
    mbarrier_init(&shared.q_full, 32);
    mbarrier_init(&shared.q_empty, kConsumers);
    for (int i = 0; i < kRangeSlots; ++i) {
      mbarrier_init(&shared.range_full[i], 32);
      mbarrier_init(&shared.range_empty[i], 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= kConsumerWarps) {
    warpgroup_lower_registers<56>();
    if (warp == kConsumerWarps) {
      produce_kv(shared, k_map, v_map, params, first, guess, lane);
    } else if (warp == kConsumerWarps + 1) {
      produce_queries(shared, params, first, lane);
    }
  } else {
    warpgroup_raise_registers<200>();
    StageRing<Traits> ring;
    for (uint32_t parity = 0;; parity ^= 1) {
      mbarrier_wait(&shared.q_full, parity);
      const int queries = shared.tile.queries;
      if (queries == kNoMoreTiles) break;
      if (shared.tile.kv_begin == shared.tile.kv_end) {
        for (int m = warp; m < queries; m += kConsumerWarps) {
          store_empty<Traits>(GlobalRows<Traits>{params.attend}, shared.tile.direct, shared.tile.out_row[m], lane);
        }
        mbarrier_arrive(&shared.q_empty);
      } else if (queries <= 8) {
        consume_short<Traits, 1>(shared, params, ring, warp, lane);
      } else if (Traits::kApart || queries <= kShortQueries) {
        consume_short<Traits, 2>(shared, params, ring, warp, lane);
      } else if (Traits::kBlocks == 1 || queries <= kBlockQueries) {
        consume_tall<Traits, 1>(shared, params, ring, warp, lane);
      } else {
        consume_tall<Traits, Traits::kBlocks>(shared, params, ring, warp, lane);
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
  return launch_in_step(params, kernel, num_ctas, kThreads, kShared, k_map, v_map, params);
}

// As many stages as fit.
template <typename T, int kHeadDim, int kBlocks>
cudaError_t dispatch_occupancy(const CUtensorMap& k_map, const CUtensorMap& v_map, const Params& params) {
  constexpr int kStages = (kBlocks <= 1 ? 3 : 2) * 128 / kHeadDim;
  if (params.attend.plan.num_ctas > params.attend.num_sms) {
    return launch<Traits<T, kHeadDim, kBlocks, kStages>, 2>(k_map, v_map, params);
  }
  return launch<Traits<T, kHeadDim, kBlocks, 6 * 128 / kHeadDim>, 1>(k_map, v_map, params);
}

template <typename T, int kHeadDim>
cudaError_t dispatch_rows(const CUtensorMap& k_map, const CUtensorMap& v_map, const Params& params) {
  if (are_apart(params)) return dispatch_occupancy<T, kHeadDim, 0>(k_map, v_map, params);
  return params.attend.plan.rows_per_tile <= kBlockQueries ? dispatch_occupancy<T, kHeadDim, 1>(k_map, v_map, params)
                                                           : dispatch_occupancy<T, kHeadDim, 2>(k_map, v_map, params);
}

template <typename T>
cudaError_t dispatch(const CUtensorMap& k_map, const CUtensorMap& v_map, const Params& params) {
  return params.attend.head_dim == 64 ? dispatch_rows<T, 64>(k_map, v_map, params)
                                      : dispatch_rows<T, 128>(k_map, v_map, params);
}

Params make_params(const AttendParams& p) {
  Params params{};
  params.attend = p;
  params.dependent = p.lists_begin > 0;
  params.group = p.num_qo_heads / p.num_kv_heads;
  params.by_group = Divisor(params.group);
  params.by_head = Divisor(p.num_kv_heads);
  const int64_t page_bytes = int64_t{4} * p.page_size * p.num_kv_heads * p.head_dim;  // K and V of all heads
  params.few_pages = static_cast<int32_t>(kSmallBytes / page_bytes);
  while ((1 << params.page_shift) < p.page_size) ++params.page_shift;
  params.box_tokens = p.page_size < kUnitKeys ? p.page_size : kUnitKeys;
  params.box_slabs = params.box_tokens == kUnitKeys ? p.head_dim / kSlab : 1;
  const bool capped = p.logits_soft_cap > 0.0f;
  params.softmax_scale = kLog2E * (capped ? p.logits_soft_cap : p.sm_scale);
  params.cap_scale = capped ? p.sm_scale / p.logits_soft_cap : 0.0f;
  return params;
}

cudaError_t run_many(const Params& params) {
  const AttendParams& p = params.attend;
  CUtensorMap k_map, v_map;
  cudaError_t error = make_cache_maps(&k_map, &v_map, p, params.box_tokens, params.box_slabs);
  if (error != cudaSuccess) return error;
  error =
      p.dtype == DType::bf16 ? dispatch<__nv_bfloat16>(k_map, v_map, params) : dispatch<__half>(k_map, v_map, params);
  return error == cudaSuccess && are_apart(params) ? run_packed(params) : error;
}

// Two kernels in a row, of which the plan decides and one leaves. In this order: the larger kernel in front would fetch
// its code, 129 KB, and the other one's wait behind it, 2 to 5 us.
cudaError_t run_either(const Params& given) {
  Params params = given;
  params.serves = Serves::not_sharing;
  const cudaError_t error = run_few(params);
  params.serves = Serves::sharing;
  params.dependent = true;
  return error == cudaSuccess ? run_many(params) : error;
}

// Two of which the plan decides, beside each other: a cluster a KV head takes half of the SMs, and the other kernel and
// its merge leave on a branch meanwhile. In a row they would leave one behind the other when the first one has ended.
// The branch begins when the clusters have seen the plan, and have left the SMs if it is not for them: the other kernel
// beside clusters that are to leave took 5 us more for its first keys.
// All begin when select has ended: one that leaves must not do so before, and 64 CTAs of select leave few GPCs room
// for a cluster (8 x 128K, 30 % read: 297 us of attention behind select, 335 beside it).
cudaError_t run_cluster_or_few(const Params& given) {
  const OnDevice<SideStream> side;
  if (side.error() != cudaSuccess) return side.error();
  Params params = given;
  params.dependent = false;
  params.serves = Serves::not_sharing;
  cudaError_t error = begin_cluster(params, side->fork());
  if (error == cudaSuccess) error = side->begin_after(side->fork());
  params.serves = Serves::sharing;
  params.attend.stream = side->stream();
  params.attend.merges = Merges::packed;
  if (error == cudaSuccess) error = run_few(params);
  if (error == cudaSuccess) error = static_cast<cudaError_t>(run_merge_cuda(params.attend));
  return error == cudaSuccess ? side->join(static_cast<cudaStream_t>(given.attend.stream)) : error;
}

Way way_of(const Params& params) {
  const AttendParams& p = params.attend;
  if (fits_cluster(params)) return {fits_packed_rows(params) ? run_cluster : run_cluster_or_few, Merges::none};
  if (are_few(params) || are_alone(params)) return {run_few, Merges::all};
  return {has_short_strides(p) && !are_apart(params) ? run_either : run_many, Merges::all};
}

}  // namespace decode90

// Head dims 64 and 128, bf16 and fp16, pages of 16, 32, 64, 128, ... keys (a power of two), at most 128 packed queries
// a tile, one query token a request. Anything else: cudaErrorInvalidValue.
int run_attend_wgmma_sm90_decode(const AttendParams& p) {
  using namespace decode90;
  const bool known_page = p.page_size >= 16 && (p.page_size & (p.page_size - 1)) == 0;
  const bool known_dtype = p.dtype == DType::bf16 || p.dtype == DType::fp16;
  if (!p.decode || !known_page || !known_dtype || (p.head_dim != 64 && p.head_dim != 128) || p.sm_scale <= 0.0f ||
      p.plan.rows_per_tile > 2 * kBlockQueries) {
    return cudaErrorInvalidValue;
  }
  const Params params = make_params(p);
  return way_of(params).run(params);
}

int wgmma_sm90_decode_merges(const AttendParams& p) {
  return static_cast<int>(decode90::way_of(decode90::make_params(p)).merges);
}

}  // namespace flashcore
