// Decode of one request under policy topk: from the summaries of a KV head's pages to the ones that it reads.
//
// The warps of a cluster have a unit of 16 pages each, or two; what a page scores goes from each CTA to all of them, by
// st.async, and each makes the same choice for itself.
#pragma once

#include "attend/wgmma_sm90_decode_topk_storage.cuh"
#include "device/cluster.cuh"
#include "device/tma.cuh"

namespace flashcore::decode90 {

// --- Scores ----------------------------------------------------------------------------------------------------------

// The first page column of a warp's unit. Units are dealt in rounds, so that a warp knows which page ids it wants
// before it is known how many there are.
__device__ __forceinline__ int32_t first_column(int rank, int warp, int round) {
  return (round * kUnitsPerRound + rank * kClusterWarps + warp) * score::kPages;
}

// A warp's memory: summaries of the pages of its units, then pieces of the pages that are chosen.
template <typename Traits, typename Score>
struct UnitSummaries {
  static constexpr uint32_t kBytes = Score::kSummaryBytes;  // of a page
  unsigned char rows[kTopkRounds][score::kPages][kBytes];   // swizzled

  static __device__ __forceinline__ UnitSummaries& of(TopkStorage<Traits>& shared, int warp) {
    static_assert(sizeof(UnitSummaries) <= sizeof(shared.rings[0]));
    return *reinterpret_cast<UnitSummaries*>(shared.rings[warp]);
  }
};

// Maps of the summaries, for boxes of a page and of a whole unit.
struct SummaryMaps {
  CUtensorMap page, unit;
};

// Asks for the summaries that this warp scores. ids: lane l has page l % 16 of the unit of round l / 16. Those of pages
// that follow each other, as the pages of a long prompt mostly do, are one copy: the copy engine takes as long for a
// summary by itself as for two in a row. Where a unit has fewer pages, its first one stands for them.
template <typename Traits, typename Score>
__device__ __forceinline__ void copy_summaries(TopkStorage<Traits>& shared, const SummaryMaps& maps, int32_t ids,
                                               int32_t columns, int kv_head, int rank, int warp, int lane) {
  auto& to = UnitSummaries<Traits, Score>::of(shared, warp);
#pragma unroll 1
  for (int round = 0; round < kTopkRounds; ++round) {
    const int32_t count = columns - first_column(rank, warp, round), in_unit = lane % score::kPages;
    if (count <= 0) break;
    auto& rows = to.rows[round];
    Mbarrier* there = &shared.summaries[warp][round];
    const int32_t own = __shfl_sync(~0u, ids, round * score::kPages + (in_unit < count ? in_unit : 0));
    const int32_t first = __shfl_sync(~0u, own, 0);
    if (__all_sync(~0u, own == first + in_unit)) {
      if (elected()) {
        mbarrier_arrive_expect_tx(there, sizeof(rows));
        tma_load_summaries(rows, &maps.unit, there, kv_head, first, kEvictFirst);
      }
    } else {
      int32_t pages[score::kPages];
#pragma unroll
      for (int i = 0; i < score::kPages; ++i) pages[i] = __shfl_sync(~0u, own, i);
      if (elected()) {
        mbarrier_arrive_expect_tx(there, sizeof(rows));
#pragma unroll
        for (int i = 0; i < score::kPages; ++i) {
          tma_load_summaries(rows[i], &maps.page, there, kv_head, pages[i], kEvictFirst);
        }
      }
    }
    __syncwarp();
  }
}

// The queries of a KV head on their way to shared memory by way of the registers of one warp: behind summaries in the
// copy engine they would be late.
template <typename Traits>
class QueryRows {
 public:
  __device__ __forceinline__ void load(const TopkParams& params, int kv_head, int lane) {
    const AttendParams& p = params.attend;
    const auto* queries = static_cast<const Element*>(p.q) + kv_head * params.group * p.q_stride_head;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (head(i, lane) < params.group) {
        blocks_[i] = load_block(queries + head(i, lane) * p.q_stride_head + channel(lane));
      }
    }
  }
  __device__ __forceinline__ void store(TopkStorage<Traits>& shared, const TopkParams& params, int lane) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (head(i, lane) >= params.group) break;
      *reinterpret_cast<Block<Element>*>(&shared.queries[head(i, lane)][channel(lane)]) = blocks_[i];
    }
    mbarrier_arrive(&shared.queries_there);
  }

 private:
  using Element = typename Traits::Element;
  static constexpr int kBlocks = Traits::kHeadDim / kBlock, kAtOnce = 32 / kBlocks, kMost = score::kSlots / kAtOnce;

  static __device__ __forceinline__ int head(int i, int lane) { return i * kAtOnce + lane / kBlocks; }
  static __device__ __forceinline__ int channel(int lane) { return lane % kBlocks * kBlock; }

  Block<Element> blocks_[kMost];
};

// The column with which shared.table begins: that of a multiple of 16 bytes ahead of the first one to choose from.
__device__ __forceinline__ int32_t table_begin(const SelectParams& p) { return p.sparse.sink_pages & ~3; }

// Asks for the page ids to choose from, and says what is to arrive until the choice can be made; one lane.
template <typename Traits>
__device__ __forceinline__ void copy_table(TopkStorage<Traits>& shared, const SelectParams& p, int32_t columns) {
  const int32_t begin = table_begin(p), ids = p.sparse.sink_pages + columns - begin;
  const uint32_t table_bytes = ceil_div(ids, 4) * 16, key_bytes = ceil_div(columns, 4) * 16;
  mbarrier_arrive_expect_tx(&shared.all_scored, table_bytes + key_bytes);
  bulk_load(shared.table, p.plan.kv_indices + begin, table_bytes, &shared.all_scored, kEvictLast);
}

// Scores this warp's part of the columns and tells all CTAs of the cluster.
template <typename Traits, typename Score>
__device__ __forceinline__ void score_columns(TopkStorage<Traits>& shared, const score::Scorer<Score>& scorer,
                                              const score::Queries<Score>& queries, int32_t columns, int rank, int warp,
                                              int lane) {
  if (first_column(rank, warp, 0) >= columns) return;
  const int to = lane / 4, four = lane % 4;  // which CTA this lane tells of which pages of a unit
  const uint32_t keys = shared_address_in_cta(shared.keys, to), told = shared_address_in_cta(&shared.all_scored, to);
  const auto& summaries = UnitSummaries<Traits, Score>::of(shared, warp);
#pragma unroll 1
  for (int round = 0; round < kTopkRounds; ++round) {
    const int32_t column = first_column(rank, warp, round);
    if (column >= columns) break;
    mbarrier_wait(&shared.summaries[warp][round], 0);
    typename score::Scorer<Score>::Part part;
    scorer.load_part(summaries.rows[round][0], part);
    const float2 scores = scorer.score_part(part, queries);
    const uint32_t own = sort_key(lane % 2 == 0 ? scores.x : scores.y);  // page lane / 4 + lane % 2 * 8
    const auto key = [&](int i) { return __shfl_sync(~0u, own, (4 * four + i) % 8 * score::kLanes + four / 2); };
    const uint4 message = make_uint4(key(0), key(1), key(2), key(3));
    if (column + 4 * four < columns) push(keys + (column + 4 * four) * sizeof(uint32_t), message, told);
  }
}

// --- The choice ------------------------------------------------------------------------------------------------------

// The columns to choose from; a thread has a stretch of them.
struct ScoredColumns {
  static constexpr int kHeld = kMostScored / kTopkThreads;

  int32_t begin, end;
  uint32_t keys[kHeld];

  __device__ __forceinline__ ScoredColumns(const uint32_t* all_keys, int32_t all) {
    const int32_t each = ceil_div(all, kTopkThreads);
    begin = min(static_cast<int32_t>(threadIdx.x) * each, all);
    end = min(begin + each, all);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) keys[i] = begin + i < end ? all_keys[begin + i] : 0;
  }
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (begin + i < end) f(keys[i], begin + i);
    }
  }
};

// f(position, column) for each of the `wanted` best columns.
template <typename Traits, class F>
__device__ __forceinline__ void for_each_best(TopkStorage<Traits>& shared, int32_t columns, int32_t wanted,
                                              const F& f) {
  const auto key = [&](int32_t column) { return shared.keys[column]; };
  if (wanted <= shared.few.kMostWanted && for_each_of_few(shared.few, columns, wanted, key, f)) return;
  shared.counts.clear();
  __syncthreads();
  const ScoredColumns scored(shared.keys, columns);
  const Threshold threshold =
      find_threshold(scored, key_range(scored, shared.counts), wanted, shared.counts, [](uint32_t) { return 1; });
  for_each_chosen(scored, threshold, shared.counts, f);
}

}  // namespace flashcore::decode90
