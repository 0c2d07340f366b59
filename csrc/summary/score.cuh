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
// known order choose the same pages on every machine. Requests that share pages score them one by one, from L2: read
// once, their summaries would leave as many instructions, as each request brings its queries (scripts/bench/NOTES.md).
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

// What of a request is scored.
template <class Traits>
struct Span {
  int32_t units = 0;  // of each KV head
  int32_t end = 0;    // columns: from the sinks to here
  int32_t table = 0;  // where its page ids begin

  Span() = default;
  __device__ Span(const SelectParams& p, int32_t r) {
    if (r >= p.pages.batch) return;
    const Choice choice(p, r);
    units = (choice.columns() + Traits::kColumns - 1) / Traits::kColumns;
    end = choice.middle_end;
    table = p.plan.kv_indptr[r];
  }
  // That of another lane. All lanes ask.
  __device__ Span of_lane(int32_t other) const {
    Span span;
    span.units = __shfl_sync(~0u, units, other);
    span.end = __shfl_sync(~0u, end, other);
    span.table = __shfl_sync(~0u, table, other);
    return span;
  }
};

// All units of the batch. The lanes of a warp count together; `own` is of the request of the lane's number.
template <class Traits>
__device__ int32_t count_units(const SelectParams& p, const Span<Traits>& own) {
  int32_t units = own.units;
#pragma unroll 1
  for (int32_t r = kWarp + threadIdx.x % kWarp; r < p.pages.batch; r += kWarp) units += Span<Traits>(p, r).units;
  return __reduce_add_sync(~0u, units) * p.pages.num_kv_heads;
}

// A unit of the line.
template <class Traits>
struct Cursor {
  Span<Traits> span;
  int32_t r, kv_head, unit;  // unit of span.units of the (request, KV head)

  // The unit `wanted` of the line. The lanes of a warp look together; `own` as above.
  __device__ Cursor(const SelectParams& p, Span<Traits> own, int32_t wanted) {
    const int32_t lane = threadIdx.x % kWarp, heads = p.pages.num_kv_heads;
    int32_t before = 0;
#pragma unroll 1
    for (int32_t base = 0;; base += kWarp, own = Span<Traits>(p, base + lane)) {
      const int32_t through = before + warp_scan(own.units) * heads;
      const uint32_t past = __ballot_sync(~0u, through > wanted);
      before = __shfl_sync(~0u, through, kWarp - 1);
      if (past == 0) continue;
      const int32_t found = __ffs(past) - 1;
      r = base + found;
      span = own.of_lane(found);
      const int32_t offset = wanted - (__shfl_sync(~0u, through, found) - span.units * heads);
      kv_head = offset / span.units;
      unit = offset - kv_head * span.units;
      return;
    }
  }

  // To the next unit, which exists; says whether it is of another request or KV head.
  __device__ bool advance(const SelectParams& p) {
    if (++unit < span.units) return false;
    unit = 0;
    if (++kv_head < p.pages.num_kv_heads) return true;
    kv_head = 0;
    do span = Span<Traits>(p, ++r);
    while (span.units == 0);
    return true;
  }
  __device__ int32_t column(const SelectParams& p) const { return p.sparse.sink_pages + unit * Traits::kColumns; }
};

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
    if (p.pages.summaries.kind == SummaryKind::min_max) {
      shape<SummaryKind::min_max>(blocks, vector);
    } else {
      shape<SummaryKind::mean_std>(blocks, vector);  // of which kind mean has the first vector
    }
  }

 private:
  template <SummaryKind kKind>
  __device__ void shape(const Block<typename Traits::T> (&blocks)[Traits::kHeads], int32_t vector) {
#pragma unroll
    for (int g = 0; g < Traits::kHeads; ++g) {
      float values[kBlock];
      unpack(blocks[g], values);
#pragma unroll
      for (int part = 0; part < Traits::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kBlock; ++i) form[g][part][i] = query_form(kKind, vector + part, values[i]);
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
  const int32_t kept;  // of the loads of a unit, the one of which the lane ends with the sums
  const uint32_t head_bytes, page_bytes;

  __device__ Scorer(const SelectParams& params, typename Traits::Ring& ring)
      : p(params),
        ring(ring),
        rule(params),
        group(params.num_qo_heads / params.pages.num_kv_heads),
        lane(threadIdx.x % kWarp),
        side(lane / Traits::kPageLanes),
        vector(lane % Traits::kPageLanes / Traits::kVectorLanes),
        channel(lane % Traits::kVectorLanes * kBlock),
        kept(lane % Traits::kVectorLanes / Traits::kHolders),
        head_bytes(Traits::kVectors * p.pages.head_dim * sizeof(S)),
        page_bytes(p.pages.num_kv_heads * head_bytes) {}

  // Scores `units` units of the line, of which `now` is the first.
  __device__ void run(Cursor<Traits> now, int32_t units) const {
    Cursor<Traits> ahead = now;
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
    Queries<Traits> queries;
    bool others = true;  // whether the queries are not those of `now`
    // One loop, also for the first fetches: between two layers the caches lose the code, and each copy of a part of it
    // would come from memory once more.
#pragma unroll 1
    for (int32_t i = 1 - kStages; i < units; ++i) {
      fetch();
      if (i < 0) continue;
      if (others) load_queries(now, 0, queries);
      copy_async_wait<kStages - 1>();
      score_unit(now, ring[i % kStages], queries);
      others = i + 1 < units && now.advance(p);
    }
  }

 private:
  __device__ int32_t load_ids(const Cursor<Traits>& at) const {
    return p.plan.kv_indices[at.span.table + min(at.column(p) + lane % Traits::kColumns, at.span.end - 1)];
  }

  __device__ void load_queries(const Cursor<Traits>& at, int32_t first, Queries<Traits>& queries) const {
    queries.load(p, at.r, at.kv_head * group + first, min(group - first, kHeads), vector, channel);
  }

  __device__ void copy_summaries(int32_t ids, int32_t kv_head, Stage& stage) const {
    const int32_t dim = p.pages.head_dim;
    const auto* summaries = static_cast<const unsigned char*>(p.pages.summaries.data) + kv_head * head_bytes +
                            (vector * dim + channel) * sizeof(S);
    const uint32_t to = shared_address(&stage[0][0][lane]);
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
      const uint32_t page = __shfl_sync(~0u, ids, i * Traits::kSide + side);
      const auto* summary = reinterpret_cast<const S*>(summaries + uint64_t{page} * page_bytes);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t block = to + (i * kParts + part) * sizeof(stage[0][0]);
        if constexpr (sizeof(Block<S>) == 16) {
          copy_async_16<128>(block, summary + part * dim, channel < dim);
        } else {
          copy_async_8(block, summary + part * dim, channel < dim);
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
    const int32_t column = at.column(p) + kept * Traits::kSide + side;
    const bool holds = lane % Traits::kHolders == 0 && vector == 0 && column < at.span.end;
    if (holds) scores_of(p, at.r, at.kv_head)[column] = score;
  }

  // The score of this lane's page when the heads from `first` on, at most kHeads, join those before them.
  __device__ float add_heads(const Stage& stage, const Queries<Traits>& queries, int32_t first, float score) const {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float values[kBlock];
        unpack(stage[i ^ kept][part][lane], values);
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
    float own[kHeads];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      own[g] = sums[0][g][0];
      if constexpr (kParts == 2) {
        own[g] = rule.join(own[g], sums[0][g][1]);
      } else if constexpr (Traits::kVectors == 2) {
        own[g] = rule.join(own[g], __shfl_xor_sync(~0u, own[g], Traits::kVectorLanes));  // only vector 0 has it right
      }
    }
    if (rule.reduction == GroupReduction::max) return reduce_heads<GroupReduction::max>(own, first, score);
    if (rule.reduction == GroupReduction::mean) return reduce_heads<GroupReduction::mean>(own, first, score);
    return reduce_heads<GroupReduction::logsumexp>(own, first, score);
  }

  template <GroupReduction kReduction>
  __device__ float reduce_heads(const float (&own)[kHeads], int32_t first, float score) const {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      if (first + g < group) score = rule.reduce<kReduction>(first + g, score, own[g]);
    }
    return score;
  }

  // Sums over the lanes of a vector, from the far half to the near one. As long as there are several pages each half of
  // the lanes goes on with half of them. Lanes have the pages in an order of their own, i ^ kept, in which those that
  // they go on with come first: no lane has to choose.
  template <int kPages, int kDistance>
  __device__ void reduce_lanes(Sums& sums) const {
    if constexpr (kDistance > 0) {
      constexpr int kKept = kPages > 1 ? kPages / 2 : 1;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const float sent = sums[kPages > 1 ? i + kKept : i][g][part];
            sums[i][g][part] = __fadd_rn(sums[i][g][part], __shfl_xor_sync(~0u, sent, kDistance));
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
  const Span<Traits> own(p, threadIdx.x % kWarp);
  const int32_t units = count_units(p, own), each = units / warps, more = units - each * warps;
  const int32_t taken = each + (warp < more);
  if (taken == 0) return;
  const Cursor<Traits> first(p, own, warp * each + min(warp, more));
  Scorer<Traits>(p, rings[threadIdx.x / kWarp]).run(first, taken);
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
