// Decode on Hopper under policy topk, one request of a model with 8 KV heads: a cluster of CTAs for each of them, from
// the summaries of its pages to the output. The step's own key and value are stored, too.
//
// Store, scores, choice and attention are four kernels elsewhere (summary/store.cu, summary/score.cuh,
// summary/select.cu, the decode kernels), each of which begins cold and hands over by way of L2. Here a KV head's
// scores go from each CTA of its cluster to all of them, by st.async; each makes the same choice for itself and attends
// to its share of the chosen pages. Where the request has no more pages than the budget, all are read, and the output
// is that of wgmma_sm90_decode_cluster.cuh to the bit.
//
// Grid   8 CTAs a KV head, one to an SM. Block: 8 warps, each with 24 KB of shared memory that it fills by itself.
// Shared 192 KB, first of summaries, 16 pages a warp and round, then of keys and values, 16 tokens a piece; the keys of
//        all scores and the page ids; partial results, pushed.
//
// What an SM loads behind its summaries, 131 KB at 128K, comes behind them, and all wait for the last one: the queries
// are loaded first, by one warp for all.
//
// Measured on an H200 with cold caches (32 query and 8 KV heads of 128, bf16, pages of 64), us of a rotary embedding
// and what follows: store, select, attend and merge / this kernel, which begins beside it. 128K with a budget of 4096:
// 21.7 / 16.3; 32K with 2048: 17.5 / 13.4; 4000 keys, all read: 17.0 / 12.4; 1000: 14.0 / 9.6. At 128K, from the
// start: summaries there 3.4, scores known to all 4.4, pages chosen 5.8, the last ones there 10.6, merged 11.3.
#pragma once

#include "attend/wgmma_sm90_decode_short_tile.cuh"
#include "attend/wgmma_sm90_decode_topk_scores.cuh"
#include "device/dependent_launch.cuh"
#include "summary/summarize.cuh"

namespace flashcore::decode90 {

// --- Attention -------------------------------------------------------------------------------------------------------

// A CTA's part of the keys that a KV head reads: cut as HeadRows cuts a row.
struct OwnKeys {
  int pieces, share;  // of 16 keys: of the head, of a CTA
  int begin, end;     // keys
  int first_page, end_page;

  __device__ __forceinline__ OwnKeys(int keys, int page_shift, int rank) : pieces(max(1, ceil_div(keys, kWarpKeys))) {
    share = share_of_cta(pieces);
    begin = min(rank * share, pieces) * kWarpKeys;
    end = min(min((rank + 1) * share, pieces) * kWarpKeys, keys);
    first_page = begin >> page_shift;
    end_page = begin < end ? ceil_div(end, 1 << page_shift) : first_page;
  }
  __device__ __forceinline__ bool has(int page) const { return page >= first_page && page < end_page; }
  // The CTAs that have keys; the first one has the output of a request without any.
  __device__ __forceinline__ unsigned ctas() const { return (1u << ceil_div(pieces, share)) - 1; }
  __device__ __forceinline__ int last_cta() const { return ceil_div(pieces, share) - 1; }
};

// Copies a warp's pieces: every eighth one of the CTA's.
template <typename Traits>
struct PieceCopies {
  TopkStorage<Traits>& shared;
  const CUtensorMap *k_map, *v_map;
  const OwnKeys& own;
  int page_shift, kv_head, warp;

  __device__ __forceinline__ int first_key(int i) const { return own.begin + (i * kClusterWarps + warp) * kWarpKeys; }
  __device__ __forceinline__ Piece<Traits>& piece(int i) const { return shared.rings[warp][i % Traits::kStages]; }
  // Asks for piece i, into stage i % kStages; the elected lane.
  __device__ __forceinline__ void ask(int i) const {
    const int key = first_key(i);
    if (key >= own.end) return;
    const int page = shared.list[(key >> page_shift) - own.first_page];
    const int token = key & ((1 << page_shift) - 1);
    Piece<Traits>& to = piece(i);
    Mbarrier* there = &shared.pieces[warp][i % Traits::kStages];
    mbarrier_arrive_expect_tx(there, 2 * Traits::kOperandBytes);
    tma_load_cache(to.k, k_map, there, token, 0, kv_head, page, kEvictFirst);
    tma_load_cache(to.v, v_map, there, token, 0, kv_head, page, kEvictFirst);
  }
  __device__ __forceinline__ void wait(int i) const {
    mbarrier_wait(&shared.pieces[warp][i % Traits::kStages], i / Traits::kStages & 1);
  }
};

// Zeroes the values of tokens from `first` on: their P is 0, but 0 * NaN would be NaN.
template <typename Traits>
__device__ __forceinline__ void zero_values(Piece<Traits>& piece, int first, int lane) {
  for (int i = first * 128 + lane * 16; i < Traits::kSlabBytes; i += 32 * 16) {
#pragma unroll
    for (int slab = 0; slab < Traits::kOperandBytes; slab += Traits::kSlabBytes) {
      *reinterpret_cast<uint4*>(piece.v + slab + i) = make_uint4(0, 0, 0, 0);
    }
  }
  __syncwarp();
}

// Adds a warp's pieces, the first ones of which have been asked for, one after the other.
template <typename Traits>
__device__ __forceinline__ void add_own_keys(ShortTile<Traits, 1>& state, const PieceCopies<Traits>& copies,
                                             const Params& params, int lane) {
  state.clear();
  state.hide_others(0, copies.own.end, lane);
  __syncwarp();
#pragma unroll 1
  for (int i = 0; copies.first_key(i) < copies.own.end; ++i) {
    const int first = copies.first_key(i);
    const bool masked = first + kWarpKeys > copies.own.end;
    Piece<Traits>& piece = copies.piece(i);
    copies.wait(i);
    if (masked) zero_values(piece, copies.own.end - first, lane);
    state.template add_keys<Traits::kSlabBytes>(params, shared_address(piece.k) + lane % 16 * 128,
                                                shared_address(piece.v) + (lane % 8 + lane / 16 * 8) * 128, first,
                                                masked, lane);
    __syncwarp();
    if (elected()) copies.ask(i + Traits::kStages);
  }
}

// Rows go to the output, or to the CTA that merges them.
template <typename Traits>
struct PushSink {
  const AttendParams& p;
  Pushed<Traits, 1>& pushed;
  int rank;

  __device__ __forceinline__ void store4(bool direct, int row, int d, float4 o) const {
    if (direct) {
      decode90::store4<Traits>(p, true, row, d, o);
    } else {
      pushed.push4(rank, row, d, o);
    }
  }
  __device__ __forceinline__ void store_lse(bool direct, int row, float lse) const {
    if (direct) {
      decode90::store_lse(p, true, row, lse);
    } else {
      pushed.push_lse(rank, row, lse);
    }
  }
};

// --- The step's own key and value ------------------------------------------------------------------------------------

// Those of one KV head, by one warp; a lane has a block of 8 channels of one of them.
template <typename T>
struct NewToken {
  Block<T> block{};
  int64_t slot = 0;

  __device__ __forceinline__ static bool has(const AttendParams& p, int lane) { return lane < 2 * p.head_dim / kBlock; }
  __device__ __forceinline__ static int channel(const AttendParams& p, int lane) {
    return lane * kBlock & (p.head_dim - 1);  // of K, then of V
  }
  __device__ __forceinline__ void load(const AttendParams& p, const NewTokens& tokens, int kv_head, int lane) {
    const bool is_k = lane * kBlock < p.head_dim;
    const auto* from = static_cast<const T*>(is_k ? tokens.k : tokens.v);
    const int64_t stride = is_k ? tokens.k_stride_head : tokens.v_stride_head;
    if (has(p, lane)) block = load_block(from + kv_head * stride + channel(p, lane));
    slot = tokens.slots[0];
  }
  // To the cache, where the copy engine will find it.
  __device__ __forceinline__ void store(const AttendParams& p, int page_shift, int kv_head, int lane) const {
    if (!has(p, lane)) return;
    const int64_t page = slot >> page_shift, offset = slot & ((1 << page_shift) - 1);
    const bool is_k = lane * kBlock < p.head_dim;
    T* to = is_k ? static_cast<T*>(const_cast<void*>(p.k)) + page * p.k_stride_page + offset * p.k_stride_token +
                       kv_head * p.k_stride_head
                 : static_cast<T*>(const_cast<void*>(p.v)) + page * p.v_stride_page + offset * p.v_stride_token +
                       kv_head * p.v_stride_head;
    *reinterpret_cast<Block<T>*>(to + channel(p, lane)) = block;
    fence_proxy_async_global();
  }
};

// --- The kernel ------------------------------------------------------------------------------------------------------

template <typename Traits, typename Score>
__global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kTopkThreads, 1)
    attend_topk_kernel(const __grid_constant__ SummaryMaps summary_maps, const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap v_map, const __grid_constant__ TopkParams params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<TopkStorage<Traits>*>(storage);
  const SelectParams& select = params.select;
  const AttendParams& p = params.attend;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = blockIdx.x / kClusterCtas, rank = blockIdx.x % kClusterCtas;

  if (!params.early) wait_for_primary();
  const int column = select.sparse.sink_pages + first_column(rank, warp, lane / score::kPages) + lane % score::kPages;
  const int32_t ids =
      column < p.plan.max_pages ? load_kept(p.plan.kv_indices + column) : 0;  // may be behind the last page
  const int32_t first_page = load_kept(p.plan.kv_indptr), end_page = load_kept(p.plan.kv_indptr + 1);
  const int last_page_len = load_kept(p.plan.last_page_len);
  if (params.early) wait_for_primary();
  QueryRows<Traits> queries;
  if (warp == 0) queries.load(params, kv_head, lane);
  if (elected()) {
    if (warp == 0) prefetch_tensor_map(&summary_maps.unit);
    if (warp == 1) prefetch_tensor_map(&summary_maps.page);
    if (warp == 2) prefetch_tensor_map(&k_map);
    if (warp == 3) prefetch_tensor_map(&v_map);
    shared.init(warp);
    mbarrier_init_fence();
  }
  __syncwarp();
  cluster_arrive_relaxed();

  const Choice choice(select, first_page, end_page);
  const int32_t columns = choice.columns();
  copy_summaries<Traits, Score>(shared, summary_maps, ids, columns, kv_head, rank, warp, lane);
  if (warp == 0) queries.store(shared, params, lane);
  NewToken<typename Traits::Element> token;
  const bool has_token = params.tokens.k != nullptr && warp == kClusterWarps - 1;
  if (has_token) token.load(p, params.tokens, kv_head, lane);
  // Meanwhile: which part of the list this CTA attends to, and of that all that needs no score.
  shared.few.clear();
  if (warp == 0 && columns > 0 && elected()) copy_table(shared, select, columns);
  const int num_pages = choice.needed() ? choice.budget : choice.pages;
  const OwnKeys own(num_pages > 0 ? (num_pages - 1) * p.page_size + last_page_len : 0, params.page_shift, rank);
  const auto put = [&](int i, int32_t page) { shared.list[i - own.first_page] = page; };
  for (int i = own.first_page + threadIdx.x; i < own.end_page; i += kTopkThreads) {
    const bool recent = choice.needed() && i >= num_pages - select.sparse.recent_pages;
    if (!choice.needed() || i < select.sparse.sink_pages || recent) {
      put(i, choice.table[recent ? choice.pages - num_pages + i : i]);
    }
  }

  cluster_wait();  // for the barriers of the others
  mbarrier_wait(&shared.queries_there, 0);
  ShortTile<Traits, 1> state;
  state.load_queries(shared.queries[0], min(lane % 8, params.group - 1) * shared.kQueryRow, lane);
  score::Queries<Score> score_queries;
  score_queries.load_rows(shared.queries[0], shared.kQueryRow, params.group, select.pages.summaries.kind);
  const score::Scorer<Score> scorer(select, score::Slots(select));
  score_columns<Traits>(shared, scorer, score_queries, columns, rank, warp, lane);
  // The CTA that attends to the step's own key stores it.
  const bool stores = params.tokens.k != nullptr && rank == own.last_cta();
  if (has_token && stores) token.store(p, params.page_shift, kv_head, lane);
  __syncthreads();  // shared.few is clear, the token is stored
  if (columns > 0) {
    mbarrier_wait(&shared.all_scored, 0);
    for_each_best(shared, columns, choice.count(select), [&](int32_t i, int32_t column) {
      const int at = select.sparse.sink_pages + i;
      if (own.has(at)) put(at, shared.table[select.sparse.sink_pages - table_begin(select) + column]);
    });
    __syncthreads();
  }

  const PieceCopies<Traits> copies{shared, &k_map, &v_map, own, params.page_shift, kv_head, warp};
  if (elected()) {
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) copies.ask(i);
  }
  if (columns > 0) {  // for layers that read the same pages
    for (int i = own.first_page + threadIdx.x; i < own.end_page; i += kTopkThreads) {
      list_of(select, 0, kv_head)[i] = shared.list[i - own.first_page];
    }
  }
  add_own_keys(state, copies, params, lane);

  // One tile a CTA, merged by whom its head belongs to.
  const unsigned in = own.ctas();
  const bool alone = __popc(in) == 1;
  const int first_row = alone ? kv_head * params.group : 0;
  if (in >> rank & 1) {
    state.add_lanes();
    state.leave(shared.rings[warp][0].share, 0, lane);
    __syncthreads();
    combine_shares<Traits, kClusterWarps>([&](int w) -> const auto& { return shared.rings[w][0].share; }, params,
                                          params.group, alone, first_row + lane,
                                          PushSink<Traits>{p, shared.pushed, rank}, warp, kClusterWarps, lane);
  }
  if (warp == 0 && rank < params.group && !alone) {
    shared.pushed.wait(0, in, lane);
    merge_pushed(shared.pushed, 0, in, p, kv_head * params.group + rank, lane);
  }

  const int32_t filled = stores ? filled_page(select.pages, 0) : -1;
  if (filled >= 0) {
    __syncthreads();  // the shares are no longer read
    summarize_full<kTopkThreads, typename Traits::Element, typename Score::S>(
        select.pages, filled, kv_head, reinterpret_cast<unsigned char*>(shared.rings), sizeof(shared.rings));
  }
}

}  // namespace flashcore::decode90
