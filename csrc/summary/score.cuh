// Scores of pages by their summaries (the formula: rules.h), at the speed that memory gives the summaries.
//
// Grid   two CTAs of 256 threads an SM; one where that leaves a warp few units, so that select gets ready beside them.
// Work   a unit is some neighbouring page columns of one (request, KV head). All units of the batch stand on a line,
//        heads within requests, and every warp takes an even stretch of it: one request gets the whole machine.
// Warp   a lane owns 8 channels of one vector of a summary (of both where a vector takes the whole warp), so 32 lanes
//        read 512 bytes of a page at once, and keeps the same channels of the group's queries in registers. A unit is
//        8 such loads (4 where the group is large); their sums are reduced over the lanes by halving, so that each lane
//        ends with the sums of one page.
// Shared a ring of 24 loads for each warp, filled by cp.async. A lane reads what it has copied itself: no barrier.
//
// Not tensor cores: at 4 query heads a KV head the products take half of the time that the bytes do, and only sums in a
// known order choose the same pages on every machine.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "device/async_copy.cuh"
#include "device/dependent_launch.cuh"
#include "plan/cta.cuh"
#include "summary/element.cuh"

namespace flashcore::score {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kCtasPerSm = 2;
constexpr int kFewUnits = 4;  // of a warp
constexpr int kRingLoads = 24;
constexpr int kLineBytes = 128;

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
  static constexpr int kDeep = (kMany ? 4 : 8) / kParts;  // such loads of a unit
  static constexpr int kColumns = kSide * kDeep;
  static constexpr int kHolders = kVectorLanes / kDeep;  // lanes of a vector that end with the sums of the same page
  static constexpr int kStages = kRingLoads / (kDeep * kParts);
  static_assert(kHolders >= 1 && kColumns <= kWarp);

  using Stage = Block<S>[kDeep][kParts][kWarp];
  using Ring = Stage[kStages];
  static constexpr int kSharedBytes = kWarps * sizeof(Ring);
};

template <class Traits>
__device__ int32_t units_of(const Choice& choice) {
  return (choice.columns() + Traits::kColumns - 1) / Traits::kColumns;
}

// A unit of the line.
template <class Traits>
struct Cursor {
  int32_t r, kv_head, unit, units;  // unit of `units` of the (request, KV head)
  int32_t begin, end;               // columns that are scored
  const int32_t* table;

  // The unit `wanted` of the line. The lanes of a warp look together.
  __device__ Cursor(const SelectParams& p, int32_t wanted) {
    const int32_t lane = threadIdx.x % kWarp, heads = p.pages.num_kv_heads;
    int32_t before = 0;
    for (int32_t base = 0;; base += kWarp) {
      const int32_t own = base + lane < p.pages.batch ? units_of<Traits>(Choice(p, base + lane)) : 0;
      const int32_t through = before + warp_scan(own * heads);
      const uint32_t past = __ballot_sync(~0u, through > wanted);
      before = __shfl_sync(~0u, through, kWarp - 1);
      if (past == 0) continue;
      const int32_t found = __ffs(past) - 1;
      open(p, base + found);
      const int32_t offset = wanted - (__shfl_sync(~0u, through, found) - units * heads);
      kv_head = offset / units;
      unit = offset % units;
      return;
    }
  }

  // To the next unit, which exists; says whether it is of another request or KV head.
  __device__ bool advance(const SelectParams& p) {
    if (++unit < units) return false;
    unit = 0;
    if (++kv_head < p.pages.num_kv_heads) return true;
    kv_head = 0;
    do open(p, r + 1);
    while (units == 0);
    return true;
  }
  __device__ int32_t column() const { return begin + unit * Traits::kColumns; }

 private:
  __device__ void open(const SelectParams& p, int32_t request) {
    const Choice choice(p, request);
    r = request;
    units = units_of<Traits>(choice);
    begin = choice.middle_begin;
    end = choice.middle_end;
    table = choice.table;
  }
};

template <class Traits>
__device__ int32_t count_units(const SelectParams& p) {
  int32_t units = 0;
  for (int32_t r = threadIdx.x % kWarp; r < p.pages.batch; r += kWarp) units += units_of<Traits>(Choice(p, r));
  return __reduce_add_sync(~0u, units) * p.pages.num_kv_heads;
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
  using Stage = typename Traits::Stage;
  static constexpr int kHeads = Traits::kHeads, kDeep = Traits::kDeep, kParts = Traits::kParts;
  static constexpr int kStages = Traits::kStages;
  using Sums = float[kDeep][kHeads][kParts];

  const SelectParams& p;
  typename Traits::Ring& ring;
  const ScoreRule rule;
  const int32_t group, lane, side, vector, channel;  // vector: the first that the lane owns channels of

  __device__ Scorer(const SelectParams& params, typename Traits::Ring& ring)
      : p(params),
        ring(ring),
        rule(params),
        group(params.num_qo_heads / params.pages.num_kv_heads),
        lane(threadIdx.x % kWarp),
        side(lane / Traits::kPageLanes),
        vector(lane % Traits::kPageLanes / Traits::kVectorLanes),
        channel(lane % Traits::kVectorLanes * kBlock) {}

  // Scores units [first, last) of the line.
  __device__ void run(int32_t first, int32_t last) const {
    const int32_t units = last - first;
    if (units <= 0) return;
    Cursor<Traits> now(p, first), ahead = now;
    int32_t ids = load_ids(ahead), fetched = 0;  // page ids of the unit that is fetched next
    const auto fetch = [&] {
      if (fetched < units) {
        copy_summaries(ids, ahead.kv_head, ring[fetched % kStages]);
        if (++fetched < units) {
          ahead.advance(p);
          ids = load_ids(ahead);
        }
      }
      copy_async_commit();  // an empty group at the end, so that the count of groups stays that of units
    };
#pragma unroll 1
    for (int i = 0; i + 1 < kStages; ++i) fetch();
    Queries<Traits> queries;
    load_queries(now, 0, queries);
#pragma unroll 1
    for (int32_t i = 0; i < units; ++i) {
      fetch();
      copy_async_wait<kStages - 1>();
      score_unit(now, ring[i % kStages], queries);
      if (i + 1 < units && now.advance(p)) load_queries(now, 0, queries);
    }
  }

 private:
  __device__ int32_t load_ids(const Cursor<Traits>& at) const {
    return at.table[min(at.column() + lane % Traits::kColumns, at.end - 1)];
  }

  __device__ void load_queries(const Cursor<Traits>& at, int32_t first, Queries<Traits>& queries) const {
    queries.load(p, at.r, at.kv_head * group + first, min(group - first, kHeads), vector, channel);
  }

  __device__ void copy_summaries(int32_t ids, int32_t kv_head, Stage& stage) const {
    const int32_t dim = p.pages.head_dim;
    const S* summaries = static_cast<const S*>(p.pages.summaries.data) + channel;
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
      const int64_t page = __shfl_sync(~0u, ids, i * Traits::kSide + side);
      const S* summary = summaries + ((page * p.pages.num_kv_heads + kv_head) * Traits::kVectors + vector) * dim;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t to = shared_address(&stage[i][part][lane]);
        if constexpr (sizeof(Block<S>) == 16) {
          copy_async_16<128>(to, summary + part * dim, channel < dim);
        } else {
          copy_async_8(to, summary + part * dim, channel < dim);
        }
      }
    }
  }

  __device__ void score_unit(const Cursor<Traits>& at, const Stage& stage, Queries<Traits>& queries) const {
    float score = add_heads(stage, queries, 0, 0.0f);
    if constexpr (Traits::kMany) {
      for (int32_t g = kHeads; g < group; g += kHeads) {
        load_queries(at, g, queries);
        score = add_heads(stage, queries, g, score);
      }
      load_queries(at, 0, queries);
    }
    const int32_t page = lane % Traits::kVectorLanes / Traits::kHolders * Traits::kSide + side;
    const int32_t column = at.column() + page;
    if (lane % Traits::kHolders == 0 && vector == 0 && column < at.end) scores_of(p, at.r, at.kv_head)[column] = score;
  }

  // The score of this lane's page when the heads from `first` on, at most kHeads, join those before them.
  __device__ float add_heads(const Stage& stage, const Queries<Traits>& queries, int32_t first, float score) const {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float values[kBlock];
        unpack(stage[i][part][lane], values);
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
      if (first + g < group) score = rule.reduce(first + g, score, own);
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
  extern __shared__ __align__(16) unsigned char storage[];
  auto& rings = reinterpret_cast<typename Traits::Ring(&)[kWarps]>(storage);
  const int32_t warps = gridDim.x * kWarps, warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  // Page ids are known to be wanted before it is known which: a line a warp comes to L2 beside the first loads.
  const int32_t ids = warp * (kLineBytes / static_cast<int32_t>(sizeof(int32_t)));
  if (threadIdx.x % kWarp == 0 && ids < p.sparse.begin) prefetch_l2(p.plan.kv_indices + ids);
  wait_for_primary();
  allow_dependents();  // behind the wait, so that select finds all that is older than this kernel finished
  const int64_t units = count_units<Traits>(p);
  Scorer<Traits>(p, rings[threadIdx.x / kWarp])
      .run(static_cast<int32_t>(units * warp / warps), static_cast<int32_t>(units * (warp + 1) / warps));
}

template <class Traits>
cudaError_t launch(const SelectParams& p) {
  constexpr int kShared = Traits::kSharedBytes;
  static const cudaError_t opt_in =
      cudaFuncSetAttribute(score_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (opt_in != cudaSuccess) return opt_in;
  const int64_t most_units = int64_t{p.pages.batch} * p.pages.num_kv_heads * p.pages.max_columns / Traits::kColumns;
  const int32_t ctas = most_units <= kFewUnits * kWarps * p.num_sms ? p.num_sms : kCtasPerSm * p.num_sms;
  return launch_dependent_shared(score_kernel<Traits>, ctas, kThreads, kShared,
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
