// Decode of one request under policy topk: its sizes, its parameters, and what a CTA keeps in shared memory.
#pragma once

#include "attend/wgmma_sm90_decode_cluster_merge.cuh"
#include "attend/wgmma_sm90_decode_pieces.cuh"
#include "summary/best_few.cuh"
#include "summary/score_product.cuh"
#include "summary/threshold.cuh"

namespace flashcore::decode90 {

constexpr int kTopkThreads = kClusterWarps * 32;
constexpr int kTopkRounds = 2;                                             // units of pages that a warp scores at most
constexpr int kUnitsPerRound = kClusterCtas * kClusterWarps;               // of a cluster
constexpr int kMostScored = kTopkRounds * kUnitsPerRound * score::kPages;  // page columns to choose from
constexpr int kMostListed = kMostScored / kClusterCtas + 4;                // pages that a CTA attends to
static_assert(kTopkRounds * score::kPages == 32, "a lane has one page id");
static_assert(score::kPages / 4 * kClusterCtas == 32, "a lane tells a CTA of four pages");

struct TopkParams : Params {
  SelectParams select;
  NewTokens tokens;
  int32_t early;  // all but the queries and the new tokens was ready before the launch ahead of this one began
};

template <typename Traits>
struct TopkStorage {
  PieceRings<Traits> rings;
  alignas(16) uint32_t keys[kMostScored];      // of the columns to choose from, in the order of scores
  alignas(16) int32_t table[kMostScored + 4];  // page ids, from the column on that table_begin() says
  Pushed<Traits, 1> pushed;
  int32_t list[kMostListed];
  Counts<kTopkThreads, 10> counts;
  BestFew<kTopkThreads, kMostScored> few;
  // Of the KV head, a row a query head; what lanes read at a time is in different banks.
  static constexpr int kQueryRow = Traits::kHeadDim + kBlock;
  alignas(16) typename Traits::Element queries[score::kSlots][kQueryRow];
  Mbarrier queries_there;
  Mbarrier all_scored;  // and the table is there
  Mbarrier summaries[kClusterWarps][kTopkRounds];
  Mbarrier pieces[kClusterWarps][Traits::kStages];

  // One lane of each warp.
  __device__ __forceinline__ void init(int warp) {
    for (int i = 0; i < kTopkRounds; ++i) mbarrier_init(&summaries[warp][i], 1);
    for (int i = 0; i < Traits::kStages; ++i) mbarrier_init(&pieces[warp][i], 1);
    if (warp == 0) {
      pushed.init();
      mbarrier_init(&queries_there, 32);
      mbarrier_init(&all_scored, 1);
    }
  }
};

}  // namespace flashcore::decode90
