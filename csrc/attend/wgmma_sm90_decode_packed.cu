// wgmma_sm90, decode of packed rows: requests that share pages, up to 128 packed queries a tile.
//
// To attend to shared pages is to prefill without a mask, and the warps are those of the prefill kernel: both products
// on the tensor cores, two warpgroups whose softmaxes alternate.
//
// Grid   a CTA an SM, which it fills. The kernel in front leaves it the SMs that packed rows are worth; where that one
//        has ended, the other CTAs begin and take what tiles are left.
//
// Measured on an H200 (32 query and 8 KV heads of 128, bf16, pages of 64), us with the merge, one kernel for all rows /
// two: 512 requests over 4 prefixes of 8192 keys with 256 of their own 258 / 206, 1024 over 8 of them 496 / 395, 512 x
// 8320 207 / 186, 128 over 4 of 32768 205 / 182, 64 over one of 65536 190 / 168, of 16384 78 / 73, of 1024 30 / 31. Of
// that, tiles of the same keys in turns: 30 us, since L2 does not hold them until the next row comes by.
#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode.h"
#include "attend/wgmma_sm90_decode_plan.cuh"
#include "attend/wgmma_sm90_prefill.cuh"

namespace flashcore::decode90 {
namespace {

// The tiles of packed rows in the order in which they are taken: rows of the same keys, which follow each other, take
// turns, so that all but the first find a tile's keys in L2. What has to be known of 31 rows comes at once, a lane
// each: where a step begins, each trip to memory counts.
class PackedOrder {
 public:
  __device__ PackedOrder(const Plan& plan, int num_kv_heads)
      : plan_(plan),
        num_heads_(num_kv_heads),
        num_rows_(load_kept(plan.counts + kRowsPacked)),
        num_tiles_(plan.packed_end(num_rows_, num_kv_heads)) {
    load(0);
  }

  __device__ int num_tiles() const { return num_tiles_; }

  // The tile to take i-th; all lanes of a warp, which does not go back.
  __device__ int tile(int i) {
    if (i >= end_) open(i);
    const int in_rows = i - first_;
    return first_ + in_rows % rows_ * row_tiles_ + in_rows / rows_;
  }

 private:
  static constexpr int kLast = 31;

  __device__ int begin_of(int row) const { return plan_.packed_end(row, num_heads_); }
  __device__ void load(int base) {
    const int row = base + static_cast<int>(threadIdx.x % 32);
    base_ = base;
    begin_ = begin_of(min(row, num_rows_));
    flags_ = plan_.rows[min(row, num_rows_ - 1)].flags;
  }
  // Of the row of a lane, or, below 0, of one that came before; the same for all lanes.
  __device__ int begin_at(int lane) const {
    return lane >= 0 ? __shfl_sync(~0u, begin_, lane) : begin_of(base_ + lane);
  }
  // The rows that tile i is of.
  __device__ void open(int i) {
    while (__shfl_sync(~0u, begin_, kLast) <= i) load(base_ + kLast);
    const int lane = kLast - __clz(__ballot_sync(~0u, begin_ <= i));
    const auto [rank, rows] = AlikeRows::of(__shfl_sync(~0u, flags_, lane));
    first_ = begin_at(lane - rank);
    row_tiles_ = begin_at(lane - rank + 1) - first_;
    rows_ = max(rows, 1);
    end_ = first_ + rows_ * row_tiles_;
  }

  const Plan& plan_;
  const int num_heads_, num_rows_, num_tiles_;
  int base_, begin_, flags_;  // lane l: where the tiles of row base_ + l begin, and its flags
  int first_ = 0, end_ = 0, rows_ = 1, row_tiles_ = 0;
};

// The tiles of packed rows to whoever is free. CTAs that begin at once have one each; when the others do is not known.
class PackedTiles {
 public:
  __device__ explicit PackedTiles(const AttendParams& p)
      : order_(p.plan, p.num_kv_heads),
        cursor_(reinterpret_cast<unsigned*>(p.plan.counts + kNextTile)),
        at_once_(left_sms(p)) {}

  // The next tile, or -1; called by one whole warp.
  __device__ int take() {
    int i = blockIdx.x;
    if (begun_ || i >= at_once_) {
      // Every CTA asks once in vain, but for those that begin at once and find no tile. The last one to ask wraps the
      // cursor to 0, ready for the next launch.
      const unsigned times = order_.num_tiles() - at_once_ + gridDim.x;
      if (threadIdx.x % 32 == 0) i = at_once_ + atomicInc(cursor_, times - 1);
      i = __shfl_sync(~0u, i, 0);
    }
    begun_ = true;
    return i < order_.num_tiles() ? order_.tile(i) : -1;
  }

 private:
  PackedOrder order_;
  unsigned* const cursor_;
  const int at_once_;
  bool begun_ = false;
};

template <typename Tr>
__global__ void __launch_bounds__(Tr::kThreads, 1)
    attend_packed_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ prefill::Maps maps) {
  allow_dependents();
  if (load_kept(p.plan.counts + kRowsPacked) > 0) prefill::attend_tiles<Tr, PackedTiles>(p, maps);
  wait_in_one_cta();
}

template <typename T, int kHeadDim, bool kSoftCap>
cudaError_t launch(const Params& params) {
  using Tr = prefill::Traits<T, kHeadDim, 2, 128, 2 * 128 / kHeadDim, 2, true, kSoftCap>;
  static_assert(Tr::kRows == 2 * kBlockQueries);
  prefill::Maps maps;
  const cudaError_t error = prefill::make_maps<Tr>(maps, params.attend);
  if (error != cudaSuccess) return error;
  const auto kernel = attend_packed_kernel<Tr>;
  constexpr int kShared = sizeof(prefill::Shared<Tr>);
  static const cudaError_t opt_in = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (opt_in != cudaSuccess) return opt_in;
  return launch_dependent_shared(kernel, params.attend.num_sms, Tr::kThreads, kShared,
                                 static_cast<cudaStream_t>(params.attend.stream), params.attend, maps);
}

template <typename T>
cudaError_t dispatch(const Params& params) {
  const bool capped = params.attend.logits_soft_cap > 0.0f;
  if (params.attend.head_dim == 64) return capped ? launch<T, 64, true>(params) : launch<T, 64, false>(params);
  return capped ? launch<T, 128, true>(params) : launch<T, 128, false>(params);
}

}  // namespace

cudaError_t run_packed(const Params& params) {
  return params.attend.dtype == DType::bf16 ? dispatch<__nv_bfloat16>(params) : dispatch<__half>(params);
}

}  // namespace flashcore::decode90
