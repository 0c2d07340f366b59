// Scores of pages by their summaries (the formula: rules.h), at the speed that memory gives the summaries.
//
// Grid   two CTAs an SM at most; in front of them one CTA for each request, which writes the summary of a page that the
//        step has filled. 256 threads.
// Work   a unit is some neighbouring page columns of one (request, KV head). All units of the batch stand on a line,
//        heads after requests, and every warp takes an even stretch of it: one request gets the whole machine.
// Warp   a lane owns 8 channels of one vector of a summary (of both where a vector takes the whole warp), so 32 lanes
//        read 512 bytes of a page at once, and keeps the same channels of the group's queries in registers. A unit is
//        8 loads (4 where the group is large); their sums are reduced over the lanes by halving, so that each lane ends
//        with the sums of one page.
//
// Not tensor cores: at 4 query heads a KV head the products take half of the time that the bytes do, and only sums in a
// known order choose the same pages on every machine.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "plan/cta.cuh"
#include "summary/summarize.cuh"

namespace flashcore::score {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kCtasPerSm = 2;

// T: of queries and keys. S: of summaries. kVectorLanes: lanes that own the channels of one vector. kMany: the group
// has more query heads than are scored at a time.
template <class T_, class S_, int kVectorLanes_, int kVectors_, bool kMany_>
struct Traits {
  using T = T_;
  using S = S_;
  static constexpr int kVectorLanes = kVectorLanes_, kVectors = kVectors_, kHeads = 4;
  static constexpr bool kMany = kMany_;
  static constexpr int kParts = kVectorLanes * kVectors > kWarp ? kVectors : 1;  // vectors that a lane owns channels of
  static constexpr int kPageLanes = kVectorLanes * kVectors / kParts;
  static constexpr int kSide = kWarp / kPageLanes;        // pages that one load of a warp reads
  static constexpr int kDeep = (kMany ? 4 : 8) / kParts;  // loads of a unit
  static constexpr int kColumns = kSide * kDeep;
  static constexpr int kHolders = kVectorLanes / kDeep;  // lanes of a vector that end with the sums of the same page
  static_assert(kHolders >= 1 && kColumns <= kWarp);
};

// Where a warp is on the line of units.
struct Position {
  int32_t r, kv_head, unit;  // unit of the (request, KV head)
};

template <class Traits>
__device__ int32_t units_of(const Choice& choice) {
  return (choice.columns() + Traits::kColumns - 1) / Traits::kColumns;
}

// Units of all requests; with `wanted` on the line, the position of it too. The lanes of a warp look together.
template <class Traits>
__device__ int32_t walk_line(const SelectParams& p, int32_t wanted, Position* position) {
  const int32_t lane = threadIdx.x % kWarp, heads = p.pages.num_kv_heads;
  int32_t before = 0;
  for (int32_t base = 0; base < p.pages.batch; base += kWarp) {
    const int32_t r = base + lane;
    const int32_t units = r < p.pages.batch ? units_of<Traits>(Choice(p, r)) : 0;
    const int32_t through = before + warp_scan(units * heads);
    const uint32_t past = __ballot_sync(~0u, through > wanted);
    if (position != nullptr && past != 0) {
      const int32_t found = __ffs(past) - 1;
      const int32_t own = __shfl_sync(~0u, units, found);
      const int32_t offset = wanted - (__shfl_sync(~0u, through, found) - own * heads);
      *position = {base + found, offset / own, offset % own};
      return 0;
    }
    before = __shfl_sync(~0u, through, kWarp - 1);
  }
  return before;
}

// A lane's channels of the queries of one (request, KV head), in the forms that its vectors are multiplied with.
template <class Traits>
struct Queries {
  float form[Traits::kHeads][Traits::kParts][kBlock];

  __device__ void load(const SelectParams& p, int32_t r, int32_t first_head, int32_t heads, int32_t vector,
                       int32_t channel) {
    using T = typename Traits::T;
    const T* q = static_cast<const T*>(p.q) + p.plan.qo_indptr[r] * p.q_stride_token + channel;
    const bool owns = channel < p.pages.head_dim;
    Block<T> blocks[Traits::kHeads];
#pragma unroll
    for (int g = 0; g < Traits::kHeads; ++g) {
      blocks[g] = g < heads && owns ? load_block(q + (first_head + g) * p.q_stride_head) : Block<T>{};
    }
#pragma unroll
    for (int g = 0; g < Traits::kHeads; ++g) {
      float values[kBlock];
      unpack(blocks[g], values);
#pragma unroll
      for (int part = 0; part < Traits::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
          form[g][part][i] = query_form(p.pages.summaries.kind, vector + part, values[i]);
        }
      }
    }
  }
};

template <class Traits>
struct Scorer {
  using S = typename Traits::S;
  static constexpr int kHeads = Traits::kHeads, kDeep = Traits::kDeep, kParts = Traits::kParts;
  using Sums = float[kDeep][kHeads][kParts];

  const SelectParams& p;
  const ScoreRule rule;
  const int32_t group, lane, side, vector, channel;  // vector: the first that the lane owns channels of

  __device__ explicit Scorer(const SelectParams& params)
      : p(params),
        rule(params),
        group(params.num_qo_heads / params.pages.num_kv_heads),
        lane(threadIdx.x % kWarp),
        side(lane / Traits::kPageLanes),
        vector(lane % Traits::kPageLanes / Traits::kVectorLanes),
        channel(lane % Traits::kVectorLanes * kBlock) {}

  // Scores units [first, last) of the line.
  __device__ void run(int32_t first, int32_t last) const {
    if (first >= last) return;
    Position at;
    walk_line<Traits>(p, first, &at);
    while (first < last) {
      const Choice choice(p, at.r);
      const int32_t units = units_of<Traits>(choice);
      const int32_t taken = min(units - at.unit, last - first);
      if (taken > 0) score_head(choice, at, taken);
      first += max(taken, 0);
      at.unit = 0;
      if (units == 0 || ++at.kv_head == p.pages.num_kv_heads) at = {at.r + 1, 0, 0};
    }
  }

 private:
  __device__ void score_head(const Choice& choice, const Position& at, int32_t units) const {
    const int32_t begin = choice.middle_begin + at.unit * Traits::kColumns, end = choice.middle_end;
    const int32_t first_head = at.kv_head * group;
    float* scores = scores_of(p, at.r, at.kv_head);
    Queries<Traits> queries;
    queries.load(p, at.r, first_head, min(group, kHeads), vector, channel);
    int32_t ids = load_ids(choice, begin, end);
    for (int32_t i = 0; i < units; ++i) {
      const int32_t column = begin + i * Traits::kColumns;
      const int32_t next_ids = i + 1 < units ? load_ids(choice, column + Traits::kColumns, end) : 0;
      Block<S> blocks[kDeep][kParts];
      load_summaries(ids, at.kv_head, blocks);
      float score = score_block(blocks, queries, 0, min(group, kHeads), 0.0f);
      if constexpr (Traits::kMany) {
        for (int32_t g = kHeads; g < group; g += kHeads) {
          queries.load(p, at.r, first_head + g, min(group - g, kHeads), vector, channel);
          score = score_block(blocks, queries, g, min(group - g, kHeads), score);
        }
        queries.load(p, at.r, first_head, kHeads, vector, channel);
      }
      const int32_t page = lane % Traits::kVectorLanes / Traits::kHolders * Traits::kSide + side;
      const bool writes = lane % Traits::kHolders == 0 && vector == 0 && column + page < end;
      if (writes) scores[column + page] = score;
      ids = next_ids;
    }
  }

  __device__ int32_t load_ids(const Choice& choice, int32_t column, int32_t end) const {
    return choice.table[min(column + lane % Traits::kColumns, end - 1)];
  }

  __device__ void load_summaries(int32_t ids, int32_t kv_head, Block<S> (&blocks)[kDeep][kParts]) const {
    const int32_t dim = p.pages.head_dim;
    const S* summaries = static_cast<const S*>(p.pages.summaries.data) + channel;
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
      const int64_t page = __shfl_sync(~0u, ids, i * Traits::kSide + side);
      const S* summary = summaries + ((page * p.pages.num_kv_heads + kv_head) * Traits::kVectors + vector) * dim;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        blocks[i][part] = channel < dim ? load_block(summary + part * dim) : Block<S>{};
      }
    }
  }

  // The score of this lane's page after `heads` more heads of the group, of which `before` are in `score`.
  __device__ float score_block(const Block<S> (&blocks)[kDeep][kParts], const Queries<Traits>& queries, int32_t before,
                               int32_t heads, float score) const {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float values[kBlock];
        unpack(blocks[i][part], values);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          float sum = 0.0f;
#pragma unroll
          for (int c = 0; c < kBlock; ++c) sum = __fmaf_rn(queries.form[g][part][c], values[c], sum);
          sums[i][g][part] = sum;
        }
      }
    }
    reduce_lanes<kDeep, Traits::kVectorLanes / 2>(sums);
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      float own = sums[0][g][0];
      if constexpr (kParts == 2) {
        own = rule.join(own, sums[0][g][1]);
      } else if constexpr (Traits::kVectors == 2) {
        own = rule.join(own, __shfl_xor_sync(~0u, own, Traits::kVectorLanes));  // only vector 0 has it right
      }
      if (g < heads) score = rule.reduce(before + g, score, own);
    }
    return score;
  }

  // Sums over the lanes of a vector, from the far half to the near one. As long as there are several pages each half of
  // the lanes goes on with half of them.
  template <int kPages, int kDistance>
  __device__ void reduce_lanes(Sums& sums) const {
    if constexpr (kDistance > 0) {
      constexpr int kKept = kPages > 1 ? kPages / 2 : 1;
      const bool upper = lane & kDistance;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            float& low = sums[i][g][part];
            const float high = kPages > 1 ? sums[i + kPages / 2][g][part] : low;
            const float sent = upper ? low : high, kept = upper ? high : low;
            low = __fadd_rn(kept, __shfl_xor_sync(~0u, sent, kDistance));
          }
        }
      }
      reduce_lanes<kKept, kDistance / 2>(sums);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) score_kernel(SelectParams p) {
  wait_for_primary();
  allow_dependents();  // behind the wait, so that select finds all that is older than this kernel finished
  const int32_t writers = p.pages.batch, cta = static_cast<int32_t>(blockIdx.x) - writers;
  if (cta < 0) {
    const int32_t page = filled_page(p.pages, blockIdx.x);
    if (page >= 0) summarize_page<typename Traits::T, typename Traits::S, kThreads>(p.pages, page, p.pages.page_size);
    return;
  }
  const int64_t units = walk_line<Traits>(p, 0, nullptr);
  const int32_t warps = (gridDim.x - writers) * kWarps, warp = cta * kWarps + threadIdx.x / kWarp;
  Scorer<Traits>(p).run(static_cast<int32_t>(units * warp / warps), static_cast<int32_t>(units * (warp + 1) / warps));
}

template <class Traits>
cudaError_t launch(const SelectParams& p) {
  const int32_t resident = kCtasPerSm * p.num_sms;
  const int32_t scorers = std::max(resident - p.pages.batch, resident / 2);
  return launch_dependent(score_kernel<Traits>, p.pages.batch + scorers, kThreads,
                          static_cast<cudaStream_t>(p.pages.stream), p);
}

template <class T, class S, int kVectorLanes, int kVectors>
cudaError_t dispatch_heads(const SelectParams& p) {
  return p.num_qo_heads / p.pages.num_kv_heads <= 4 ? launch<Traits<T, S, kVectorLanes, kVectors, false>>(p)
                                                    : launch<Traits<T, S, kVectorLanes, kVectors, true>>(p);
}

template <class T, class S, int kVectorLanes>
cudaError_t dispatch_vectors(const SelectParams& p) {
  return p.pages.summaries.vectors() == 2 ? dispatch_heads<T, S, kVectorLanes, 2>(p)
                                          : dispatch_heads<T, S, kVectorLanes, 1>(p);
}

template <class T, class S>
cudaError_t dispatch(const SelectParams& p) {
  const int32_t blocks = p.pages.head_dim / kBlock;
  if (blocks <= 8) return dispatch_vectors<T, S, 8>(p);
  if (blocks <= 16) return dispatch_vectors<T, S, 16>(p);
  return blocks <= 32 ? dispatch_vectors<T, S, 32>(p) : cudaErrorInvalidValue;
}

}  // namespace flashcore::score
