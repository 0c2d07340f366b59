// Decode on Hopper, tiles of few queries out of rings of pieces: every warp finds its tile's pages by itself and keeps
// a ring of its own filled by cp.async, 16 keys a piece. There are no tensor maps, no barriers before the end of a tile
// and one way through the code: of a small step that is most of the time.
#pragma once

#include "arithmetic.h"
#include "attend/wgmma_sm90_decode_plan.cuh"
#include "attend/wgmma_sm90_decode_short_tile.cuh"
#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/async_copy.cuh"
#include "device/dependent_launch.cuh"

namespace flashcore::decode90 {

// Strides of a cache in elements; products of 32 bits take fewer instructions.
struct ShortStrides {
  int32_t page, token, head;
};

struct FewParams : Params {
  ShortStrides k, v;

  explicit FewParams(const Params& params) : Params(params) {
    const auto narrow = [](int64_t stride) { return static_cast<int32_t>(stride); };
    const AttendParams& p = params.attend;
    k = {narrow(p.k_stride_page), narrow(p.k_stride_token), narrow(p.k_stride_head)};
    v = {narrow(p.v_stride_page), narrow(p.v_stride_token), narrow(p.v_stride_head)};
  }
};

template <typename T, int kHeadDim_, int kWarps_>
struct FewTraits {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kStepKeys = kWarps * kWarpKeys;
  static constexpr int kStages = 3 * 128 / kHeadDim;  // 24 KB a warp
  static constexpr int kSlabBytes = kWarpKeys * 128;
  static constexpr int kOperandBytes = kHeadDim / kSlab * kSlabBytes;
};

// Keys and values of 16 tokens; once they are consumed, what a warp leaves for the others.
template <typename Traits>
union Piece {
  struct {
    uint8_t k[Traits::kOperandBytes];  // [slabs][16 keys][128 bytes], swizzled
    uint8_t v[Traits::kOperandBytes];
  };
  Share<Traits::kHeadDim> share;
};

template <typename Traits>
using PieceRings = Piece<Traits>[Traits::kWarps][Traits::kStages];

// Copies a warp's 16 keys of every step of a CTA's tiles, ahead of the arithmetic and across tiles.
template <typename Traits, typename Tiles>
class PieceLoader {
 public:
  __device__ __forceinline__ PieceLoader(const FewParams& params, TileRange range, Tiles& tiles, int warp, int lane)
      : params_(params), tiles_(tiles), next_tile_(range.begin), end_tile_(range.end), warp_(warp), lane_(lane) {}

  // Asks for the first page ids, where nobody writes them meanwhile.
  __device__ __forceinline__ void begin() {
    if (params_.attend.lists_begin == 0 && next_tile_ != end_tile_) open(next_tile_++);
  }

  // The next piece, or nothing behind the last one. What lies behind the tile's keys becomes zeros.
  __device__ __forceinline__ void load(Piece<Traits>& piece) {
    while (key_ >= kv_end_) {
      if (next_tile_ == end_tile_) return;
      open(next_tile_++);
    }
    const AttendParams& p = params_.attend;
    const int page_shift = params_.page_shift;
    const int key = key_ + warp_ * kWarpKeys;
    // Behind the tile's keys there is nothing to look up, and the ids that come next are the next tile's.
    if (key < kv_end_ && key >> page_shift >= ids_begin_ + 32) take_ids();
    const int row = lane_ / kRowLanes, chunk = lane_ % kRowLanes;
    const int page = __shfl_sync(~0u, ids_, (key >> page_shift) - ids_begin_);
    const int token = (key & ((1 << page_shift) - 1)) + row;
    const int rows = kv_end_ - key - row;
    const auto copy = [&](uint8_t* operand, const void* cache, const ShortStrides& stride) {
      const Element* from = static_cast<const Element*>(cache) + int64_t{page} * stride.page +
                            (token * stride.token + head_ * stride.head + chunk * 8);
      // As swizzled() does, but the row's part of it is not to be computed again for every i: 24 instructions.
      const uint32_t to = shared_address(operand) + chunk / 8 * Traits::kSlabBytes + row * 128;
#pragma unroll
      for (int i = 0; i < kWarpKeys; i += kRowsAtOnce) {
        copy_async_16<Traits::kHeadDim * 2>(to + i * 128 + ((chunk % 8) ^ ((row + i) % 8)) * 16,
                                            from + i * stride.token, i < rows);
      }
    };
    copy(piece.k, p.k, params_.k);
    copy(piece.v, p.v, params_.v);
    key_ += Traits::kStepKeys;
  }

 private:
  using Element = typename Traits::Element;
  static constexpr int kRowLanes = Traits::kHeadDim / 8;  // lanes that copy a row, 16 bytes each
  static constexpr int kRowsAtOnce = 32 / kRowLanes;

  __device__ __forceinline__ void open(int i) {
    if (!tiles_.holds(i)) tiles_.load(i, lane_);
    const PageWindow window = pages_of(i);
    key_ = tiles_.kv_begin(i);
    kv_end_ = tiles_.kv_end(i);
    head_ = tiles_.pair(i) % params_.by_head;
    ids_begin_ = window.first;
    ids_ = ahead_tile_ == i ? ahead_ids_ : window.load(lane_);
    ahead_ = window;
    look_ahead(i);
  }

  __device__ __forceinline__ void take_ids() {
    ids_ = ahead_ids_;
    ids_begin_ += 32;
    look_ahead(next_tile_ - 1);
  }

  // Asks for the ids behind ids_: of tile i or, where it has no more, of the next one.
  __device__ __forceinline__ void look_ahead(int i) {
    ahead_.first += 32;
    if (ahead_.first >= ahead_.columns && i + 1 < end_tile_ && tiles_.holds(i + 1)) {
      ahead_ = pages_of(i + 1);
      ahead_tile_ = i + 1;
    }
    ahead_ids_ = ahead_.load(lane_);
  }

  __device__ __forceinline__ PageWindow pages_of(int i) const {
    return tiles_.pages(i, params_.page_shift, params_.attend.lists_begin);
  }

  const FewParams& params_;
  Tiles& tiles_;
  int next_tile_;
  const int end_tile_, warp_, lane_;
  // Of the tile that is being loaded.
  int key_ = 0, kv_end_ = 0, head_ = 0;
  int32_t ids_ = 0;  // lane l: of page column ids_begin_ + l
  int ids_begin_ = 0;
  // Ids asked for early, and the tile that they begin, if they do.
  PageWindow ahead_{};
  int32_t ahead_ids_ = 0;
  int ahead_tile_ = -1;
};

__device__ __forceinline__ PackedQuery packed_query(const FewParams& params, const Tile& tile, int m) {
  const int first_head = tile.pair % params.by_head * params.group;
  return {params.attend, tile, first_head, m / params.by_group, m % params.by_group, m};
}

// A tile without keys.
template <typename Traits, typename Sink>
__device__ __forceinline__ void attend_none(const FewParams& params, const Tile& tile, Sink& sink, int warp, int lane) {
  const int queries = tile.q_count * params.group;
  const PackedQuery query = packed_query(params, tile, min(lane, queries - 1));
  sink.meet();
#pragma unroll 1
  for (int m = warp; m < queries; m += Traits::kWarps) {
    store_empty<Traits>(sink, tile.partial < 0, __shfl_sync(~0u, query.out_row, m), lane);
  }
}

// A tile of at least one key and at most 8 * kN queries: a warp takes the keys it has loaded. Or, kTeams, of twice as
// many queries: all warps wait for a step's keys, and each takes its team's share of them. `slot` is where the loader
// goes on; `sink` takes the rows.
template <typename Traits, int kN, bool kTeams, typename Tiles, typename Sink>
__device__ __forceinline__ void attend_few(PieceRings<Traits>& rings, const FewParams& params, const Tile& tile,
                                           PieceLoader<Traits, Tiles>& loader, int& loaded, int& slot, Sink& sink,
                                           int warp, int lane) {
  constexpr int kWarps = Traits::kWarps;
  const AttendParams& p = params.attend;
  const int queries = tile.q_count * params.group;
  const bool alone = !kTeams || queries <= kShortQueries;
  const int team_warps = alone ? kWarps : kWarps / 2;
  const int member = warp & (team_warps - 1), first_warp = warp - member;
  const int first_query = first_warp == 0 ? 0 : kShortQueries;  // the second team's
  const auto sync = [&] {
    if (alone) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  // The queries are on their way before the first keys are: behind these they would wait for them all.
  ShortTile<Traits, kN> state;
  const PackedQuery query = packed_query(params, tile, min(first_query + lane % kShortQueries, queries - 1));
  int position = load_kept(p.plan.positions + query.token);
  state.ask_for_queries(static_cast<const typename Traits::Element*>(p.q), query.offset, lane);
  int32_t out_row = 0;               // lane m: of query m of the team
  int free_begin = 0, free_end = 0;  // keys in here are visible to every query of the team
  bool known = false;
  for (int key = tile.kv_begin; key < tile.kv_end;) {
    loader.load(rings[warp][slot]);
    copy_async_commit();
    if (++slot == Traits::kStages) slot = 0;
    if (++loaded < Traits::kStages) continue;  // the ring fills
    if (!known) {
      known = true;
      asm volatile("" : "+r"(position));  // looked at no sooner: the first keys are asked for meanwhile
      state.place_queries(lane);
      state.clear();
      out_row = query.out_row;
      const int last = position - tile.kv_pos;  // the last key of the row that a causal query sees
      const int begin = p.window_left < 0 ? 0 : max(0, last - p.window_left);
      const int end = p.causal ? min(tile.kv_end, last + 1) : tile.kv_end;
      free_begin = __reduce_max_sync(~0u, begin);
      free_end = __reduce_min_sync(~0u, end);
      state.hide_others(begin, end, lane);
    }
    copy_async_wait<Traits::kStages - 1>();
    sync();
#pragma unroll 1
    for (int w = 0; w < kWarps; w += team_warps) {
      // The oldest piece, which the next load will overwrite.
      const Piece<Traits>& piece = rings[w + member][slot];
      const int first = key + (w + member) * kWarpKeys;
      state.template add_keys<Traits::kSlabBytes>(params, shared_address(piece.k) + lane % 16 * 128,
                                                  shared_address(piece.v) + (lane % 8 + lane / 16 * 8) * 128, first,
                                                  first < free_begin || first + kWarpKeys > free_end, lane);
    }
    sync();
    key += Traits::kStepKeys;
  }

  // The slot of the last unit holds the warps' shares.
  state.add_lanes();
  sink.meet();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    state.leave(rings[warp][slot].share, n, lane);
    __syncthreads();
    combine_shares<Traits, kWarps>([&](int w) -> const auto& { return rings[first_warp + w][slot].share; }, params,
                                   min(8, queries - first_query - 8 * n), tile.partial < 0,
                                   __shfl_sync(~0u, out_row, 8 * n + lane % 8), sink, member, team_warps, lane);
    __syncthreads();
  }
}

}  // namespace flashcore::decode90
