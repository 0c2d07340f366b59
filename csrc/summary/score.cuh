// Scores of pages by their summaries (the formula: rules.h), on tensor cores, at the speed that memory gives the
// summaries.
//
// Unit    16 neighbouring page columns of one KV head, by the query heads of all requests that have these pages there:
//         m16n8k16, whose 8 columns are slots of query heads, a power of two of them for each request. A summary's two
//         vectors are two sums, of the queries in two forms. What a score comes to does not depend on who else is in a
//         product, so requests get the same scores alone and together.
// Grid    a warp for each unit that there may be, if that is up to four CTAs an SM: it knows its unit without a look at
//         the batch. Else two CTAs an SM, and all units stand on a line: units within blocks of requests, within KV
//         heads, within spans, which are requests, or stretches of pages that requests share (share.h). Every warp
//         takes an even piece of it, so that a shared page is read once for 64 query heads.
// Warp    lane l owns 8 channels (l % 4) of each 32 of the pages l / 4 and l / 4 + 8, and of the query head in slot
//         l / 4. These are its parts of A and B in two steps of the product: channels may stand in any order, as long
//         as it is one.
// Shared  a ring of units for each warp (where it has one, that), filled by cp.async. A lane reads what it has copied
//         itself: no barrier.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <type_traits>

#include "arithmetic.h"
#include "device/async_copy.cuh"
#include "device/dependent_launch.cuh"
#include "device/mma_sm80.cuh"
#include "plan/cta.cuh"
#include "summary/element.cuh"

namespace flashcore::score {

constexpr int kCtasPerSm = 2;
constexpr int kFewCtasPerSm = 4;       // where a warp has one unit
constexpr int kRingBytes = 96 * 1024;  // of a CTA
constexpr int kLineBytes = 128;
constexpr int kPages = 16;        // of a unit
constexpr int kSlots = 8;         // query heads of one product
constexpr int kLanes = 4;         // that have the channels of one page
constexpr int kLogMostSlots = 6;  // of a block of requests: eight products by one unit's summaries

// T: of queries and keys. S: of summaries. kChunks: of 32 channels that hold one vector.
template <class T_, class S_, int kChunks_, int kVectors_>
struct Traits {
  using T = T_;
  using S = S_;
  static constexpr int kChunks = kChunks_, kVectors = kVectors_;
  using Stage = Block<S>[kVectors][kChunks][2][kWarp];
  static constexpr int kWarps = sizeof(Stage) > 8192 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kStages = std::min<int>(kRingBytes / kWarps / sizeof(Stage), 8);
  using Ring = Stage[kStages];
};

// How the query heads of requests stand in slots.
struct Slots {
  int32_t group;        // query heads of a KV head
  int32_t log_heads;    // slots of a request: the next power of two
  int32_t log_members;  // requests of a block, one for each lane at most

  __device__ explicit Slots(const SelectParams& p)
      : group(p.num_qo_heads / p.pages.num_kv_heads),
        log_heads(std::bit_width(static_cast<uint32_t>(group - 1))),
        log_members(min(5, max(0, kLogMostSlots - log_heads))) {}
  __device__ int32_t heads() const { return 1 << log_heads; }
  __device__ int32_t member(int32_t slot) const { return slot >> log_heads; }
  __device__ int32_t head(int32_t slot) const { return slot & (heads() - 1); }
  __device__ int32_t products(int32_t members) const { return ceil_div(members << log_heads, kSlots); }
};

// Page columns that are scored for the same requests.
struct Span {
  int32_t units = 0;    // of each KV head and block of requests
  int32_t first = 0;    // of them, counted from the sinks
  int32_t end = 0;      // columns: to here
  int32_t table = 0;    // where its page ids begin
  int32_t members = 0;  // requests

  __device__ static Span of_request(const SelectParams& p, int32_t r) {
    const Choice choice(p, r);
    Span span;
    span.units = ceil_div(choice.columns(), kPages);
    span.end = choice.middle_end;
    span.table = p.plan.kv_indptr[r];
    span.members = 1;
    return span;
  }
  // Whole units; of one request alone the last one, too.
  __device__ static Span of_stretch(const SelectParams& p, const Stretch& stretch) {
    Span span;
    span.members = stretch.rank + 1;
    span.end = min(stretch.end, p.pages.max_columns);
    const int32_t columns = max(span.end - p.sparse.sink_pages, 0) + (stretch.rank > 0 ? 0 : kPages - 1);
    span.first = max(stretch.begin - p.sparse.sink_pages, 0) / kPages;
    span.units = max(columns / kPages - span.first, 0);
    span.table = p.plan.kv_indptr[stretch.request];
    return span;
  }
  __device__ int32_t blocks(const Slots& slots) const {
    return ceil_div(members, 1 << slots.log_members);
  }
};

// The line of all units. The lanes of a warp count together, `own` is the span of the lane's number.
struct Line {
  const SelectParams& p;
  const Slots slots;
  const bool stretched;
  const int32_t spans;
  const Span own;

  __device__ explicit Line(const SelectParams& p)
      : p(p),
        slots(p),
        stretched(p.pages.batch > 1 && p.plan.counts[kNumStretches] > 0),
        spans(stretched ? p.plan.counts[kNumStretches] : p.pages.batch),
        own(span(threadIdx.x % kWarp)) {}
  __device__ Span span(int32_t i) const {
    if (i >= spans) return {};
    return stretched ? Span::of_stretch(p, p.plan.stretches[i]) : Span::of_request(p, i);
  }
  __device__ int32_t units_of(const Span& span) const { return span.units * span.blocks(slots) * p.pages.num_kv_heads; }
  __device__ int32_t units() const {
    int32_t units = units_of(own);
#pragma unroll 1
    for (int32_t i = kWarp + threadIdx.x % kWarp; i < spans; i += kWarp) units += units_of(span(i));
    return __reduce_add_sync(~0u, units);
  }
};

// Where the scores of a unit belong.
struct Place {
  int32_t kv_head, column, end;  // columns: the first of the unit, and the first that is none of its span's
};

// A unit of the line.
struct Cursor {
  Span span;
  int32_t i, kv_head, block, unit;

  // The unit `wanted` of the line.
  __device__ Cursor(const Line& line, int32_t wanted) {
    Span own = line.own;
    int32_t before = 0;
#pragma unroll 1
    for (int32_t base = 0;; base += kWarp, own = line.span(base + threadIdx.x % kWarp)) {
      const int32_t through = before + warp_scan(line.units_of(own));
      const uint32_t past = __ballot_sync(~0u, through > wanted);
      before = __shfl_sync(~0u, through, kWarp - 1);
      if (past == 0) continue;
      const int32_t found = __ffs(past) - 1;
      i = base + found;
      span = shuffle(own, found);
      const int32_t offset = wanted - (__shfl_sync(~0u, through, found) - line.units_of(span));
      const int32_t rest = offset / span.units, blocks = span.blocks(line.slots);
      unit = offset - rest * span.units;
      kv_head = rest / blocks;
      block = rest - kv_head * blocks;
      return;
    }
  }

  // To the next unit, which exists; says whether it is by other queries.
  __device__ bool advance(const Line& line) {
    if (++unit < span.units) return false;
    unit = 0;
    if (++block < span.blocks(line.slots)) return true;
    block = 0;
    if (++kv_head < line.p.pages.num_kv_heads) return true;
    kv_head = 0;
    do span = line.span(++i);
    while (span.units == 0);
    return true;
  }
  __device__ Place place(const SelectParams& p) const {
    return {kv_head, p.sparse.sink_pages + (span.first + unit) * kPages, span.end};
  }
};

// The requests of a block: each lane has one.
struct Members {
  int32_t count, request, token;

  __device__ void load_alone(const SelectParams& p, int32_t r) {
    count = 1;
    request = r;
    token = p.plan.qo_indptr[r];
  }
  __device__ void load(const Line& line, const Cursor& at) {
    const int32_t first = at.block << line.slots.log_members;
    count = min(at.span.members - first, 1 << line.slots.log_members);
    const int32_t mine = min(static_cast<int32_t>(threadIdx.x % kWarp), count - 1);
    request = line.stretched ? line.p.plan.stretches[at.i - (at.span.members - 1) + first + mine].request : at.i;
    token = line.p.plan.qo_indptr[request];
  }
};

// What vector 0 or 1 of a summary is multiplied with, for a pair of 16-bit floats (query_form, rules.h).
template <SummaryKind kKind>
__device__ uint32_t query_form_of_pair(int vector, uint32_t pair) {
  if constexpr (kKind == SummaryKind::min_max) {
    uint32_t negative;  // all bits of those that are
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(negative) : "r"(pair));
    return pair & (vector == 0 ? negative : ~negative);
  }
  return vector == 0 ? pair : pair & 0x7fff7fffu;
}

// Pairs of T, as tensor cores take them.
template <class T, class S>
__device__ void to_words(const Block<S>& block, uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<T, S>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = block.words[i];
  } else {
    float values[kBlock];
    unpack(block, values);
    Block<T> wide;
    store_block(reinterpret_cast<T*>(&wide), values);  // exact
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = wide.words[i];
  }
}

// A lane's part of B: its channels of one query head, in the forms that the vectors are multiplied with.
template <class Traits>
struct Queries {
  uint32_t form[Traits::kVectors][Traits::kChunks][4];

  __device__ void load(const SelectParams& p, const Slots& slots, const Members& members, int32_t kv_head,
                       int32_t product) {
    using T = typename Traits::T;
    const int32_t lane = threadIdx.x % kWarp, slot = product * kSlots + lane / kLanes;
    const int32_t member = slots.member(slot), head = slots.head(slot);
    const int64_t token = __shfl_sync(~0u, members.token, member);
    const T* q = static_cast<const T*>(p.q) + token * p.q_stride_token +
                 (kv_head * slots.group + head) * p.q_stride_head + lane % kLanes * kBlock;
    const bool exists = member < members.count && head < slots.group;
    Block<T> blocks[Traits::kChunks];
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      const int32_t channel = (c * kLanes + lane % kLanes) * kBlock;
      blocks[c] = exists && channel < p.pages.head_dim ? load_block(q + c * kLanes * kBlock) : Block<T>{};
    }
    if (p.pages.summaries.kind == SummaryKind::min_max) {
      shape<SummaryKind::min_max>(blocks);
    } else {
      shape<SummaryKind::mean_std>(blocks);  // of which kind mean has the first vector
    }
  }

 private:
  template <SummaryKind kKind>
  __device__ void shape(const Block<typename Traits::T> (&blocks)[Traits::kChunks]) {
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int vector = 0; vector < Traits::kVectors; ++vector) {
          form[vector][c][i] = query_form_of_pair<kKind>(vector, blocks[c].words[i]);
        }
      }
    }
  }
};

template <class Traits>
struct Scorer {
  using S = typename Traits::S;
  using T = typename Traits::T;
  using Stage = typename Traits::Stage;
  static constexpr int kVectors = Traits::kVectors, kChunks = Traits::kChunks;
  using Sums = float[4];  // pages l / 4 and l / 4 + 8 (halves) by slots 2 * (l % 4) and the next one

  const SelectParams& p;
  const Slots slots;
  const ScoreRule rule;
  const int32_t lane;
  const uint32_t head_bytes, page_bytes;

  __device__ Scorer(const SelectParams& p, const Slots& slots)
      : p(p),
        slots(slots),
        rule(p),
        lane(threadIdx.x % kWarp),
        head_bytes(kVectors * p.pages.head_dim * sizeof(S)),
        page_bytes(p.pages.num_kv_heads * head_bytes) {}

  // The page of this lane's number in a unit.
  __device__ int32_t load_id(int32_t table, const Place& at) const {
    return p.plan.kv_indices[table + min(at.column + lane % kPages, at.end - 1)];
  }

  __device__ void copy_summaries(int32_t ids, int32_t kv_head, Stage& stage) const {
    const int32_t dim = p.pages.head_dim, channel = lane % kLanes * kBlock;
    const auto* summaries = static_cast<const unsigned char*>(p.pages.summaries.data) + kv_head * head_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t page = __shfl_sync(~0u, ids, half * (kPages / 2) + lane / kLanes);
      const auto* summary = reinterpret_cast<const S*>(summaries + uint64_t{page} * page_bytes) + channel;
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t to = shared_address(&stage[vector][c][half][lane]);
          const bool exists = c * kLanes * kBlock + channel < dim;
          if constexpr (sizeof(Block<S>) == 16) {
            copy_async_16<128>(to, summary + vector * dim + c * kLanes * kBlock, exists);
          } else {
            copy_async_8(to, summary + vector * dim + c * kLanes * kBlock, exists);
          }
        }
      }
    }
  }

  // Scores a unit, whose summaries are there when at most kPending of the latest copies are on their way, for the
  // members. `queries` are those of the first product if they are `there`.
  template <int kPending>
  __device__ void score(const Place& at, const Members& members, const Stage& stage, Queries<Traits>& queries,
                        bool there) const {
    const int32_t products = slots.products(members.count);
    float before[2];  // what the slots before have given a request with more heads than a product has
#pragma unroll 1
    for (int32_t product = 0; product < products; ++product) {
      if (!there || product > 0) queries.load(p, slots, members, at.kv_head, product);
      copy_async_wait<kPending>();
      Sums sums;
      multiply(stage, queries, sums);
      if (rule.reduction == GroupReduction::max) {
        finish<GroupReduction::max>(at, members, product, sums, before);
      } else if (rule.reduction == GroupReduction::mean) {
        finish<GroupReduction::mean>(at, members, product, sums, before);
      } else {
        finish<GroupReduction::logsumexp>(at, members, product, sums, before);
      }
    }
  }

 private:
  // What each page of a unit gets from each slot of a product.
  __device__ void multiply(const Stage& stage, const Queries<Traits>& queries, Sums& sums) const {
    float sum[kVectors][4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
        uint32_t low[4], high[4];
        to_words<T>(stage[vector][c][0][lane], low);
        to_words<T>(stage[vector][c][1][lane], high);
        const auto& q = queries.form[vector][c];
        mma_m16n8k16<T>(sum[vector], {low[0], high[0], low[1], high[1]}, q[0], q[1]);
        mma_m16n8k16<T>(sum[vector], {low[2], high[2], low[3], high[3]}, q[2], q[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = kVectors == 2 ? rule.join(sum[0][i], sum[kVectors - 1][i]) : sum[0][i];
    }
  }

  // Reduces the slots of each request of a product and stores the scores of those that are complete.
  template <GroupReduction kReduction>
  __device__ void finish(const Place& at, const Members& members, int32_t product, Sums& sums,
                         float (&before)[2]) const {
    const int32_t slot = product * kSlots + lane % kLanes * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = slots.head(slot + i % 2) < slots.group;
      sums[i] = exists ? rule.of_head<kReduction>(sums[i]) : rule.nothing<kReduction>();
    }
    if (slots.heads() > 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float score = rule.combine<kReduction>(sums[2 * half], sums[2 * half + 1]);
        if (slots.heads() > 2) score = rule.combine<kReduction>(score, __shfl_xor_sync(~0u, score, 1));
        if (slots.heads() > 4) score = rule.combine<kReduction>(score, __shfl_xor_sync(~0u, score, 2));
        if (slots.head(product * kSlots) > 0) score = rule.combine<kReduction>(before[half], score);
        sums[2 * half] = before[half] = score;
      }
    }
    const int32_t last = max(slots.heads() - kSlots, 0);  // slot of a request with which its last product begins
    const int32_t column = at.column + lane / kLanes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && slots.heads() > 1) break;
      const int32_t member = slots.member(slot + i);
      const int32_t request = __shfl_sync(~0u, members.request, member);
      if (slots.head(slot + i) != last || member >= members.count) continue;
      float* scores = scores_of(p, request, at.kv_head);
      if (column < at.end) scores[column] = sums[i];
      if (column + kPages / 2 < at.end) scores[column + kPages / 2] = sums[i + 2];
    }
  }
};

// Page ids are known to be wanted before it is known which: a line a warp comes to L2 beside the first loads.
__device__ inline void prefetch_ids(const SelectParams& p, int32_t warp) {
  const int32_t ids = warp * (kLineBytes / static_cast<int32_t>(sizeof(int32_t)));
  if (threadIdx.x % kWarp == 0 && ids < p.sparse.begin) prefetch_l2(p.plan.kv_indices + ids);
}

// A warp for each unit that there may be.
struct FewUnits {
  Divisor by_units, by_heads;

  explicit FewUnits(const SelectParams& p)
      : by_units(ceil_div(p.pages.max_columns, kPages)), by_heads(p.pages.num_kv_heads) {}
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kFewCtasPerSm) score_few_kernel(SelectParams p, FewUnits few) {
  extern __shared__ __align__(16) unsigned char storage[];
  auto& stages = reinterpret_cast<typename Traits::Stage(&)[Traits::kWarps]>(storage);
  const int32_t warp = blockIdx.x * Traits::kWarps + threadIdx.x / kWarp;
  prefetch_ids(p, warp);
  wait_for_primary();
  allow_dependents();  // behind the wait, so that select finds all that is older than this kernel finished
  const int32_t pair = warp / few.by_units, r = pair / few.by_heads;
  if (r >= p.pages.batch) return;
  const Span span = Span::of_request(p, r);
  const int32_t unit = warp % few.by_units;
  if (unit >= span.units) return;
  const Place at = {pair % few.by_heads, p.sparse.sink_pages + unit * kPages, span.end};
  auto& stage = stages[threadIdx.x / kWarp];
  const Scorer<Traits> scorer(p, Slots(p));
  scorer.copy_summaries(scorer.load_id(span.table, at), at.kv_head, stage);
  copy_async_commit();
  Members members;
  members.load_alone(p, r);
  Queries<Traits> queries;
  scorer.template score<0>(at, members, stage, queries, false);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kCtasPerSm) score_kernel(SelectParams p) {
  extern __shared__ __align__(16) unsigned char storage[];
  constexpr int kStages = Traits::kStages;
  auto& ring = reinterpret_cast<typename Traits::Ring(&)[Traits::kWarps]>(storage)[threadIdx.x / kWarp];
  const int32_t warps = gridDim.x * Traits::kWarps, warp = blockIdx.x * Traits::kWarps + threadIdx.x / kWarp;
  prefetch_ids(p, warp);
  wait_for_primary();
  allow_dependents();  // as above
  const Line line(p);
  const int32_t all = line.units(), each = all / warps, more = all - each * warps;
  const int32_t units = each + (warp < more);
  if (units == 0) return;
  const Scorer<Traits> scorer(p, line.slots);
  Cursor now(line, warp * each + min(warp, more)), ahead = now;
  int32_t ids = scorer.load_id(ahead.span.table, ahead.place(p)), fetched = 0;  // of the unit that is fetched next
  const auto fetch = [&] {
    if (fetched < units) {
      scorer.copy_summaries(ids, ahead.kv_head, ring[fetched % kStages]);
      if (++fetched < units) {
        ahead.advance(line);
        ids = scorer.load_id(ahead.span.table, ahead.place(p));
      }
    }
    copy_async_commit();  // an empty group at the end, so that the count of groups stays that of units
  };
  Members members;
  Queries<Traits> queries;
  bool there = false;  // whether the queries are the first ones of `now`
  // One loop, also for the first fetches: between two layers the caches lose the code, and each copy of a part of it
  // would come from memory once more.
#pragma unroll 1
  for (int32_t i = 1 - kStages; i < units; ++i) {
    fetch();
    if (i < 0) continue;
    if (!there) members.load(line, now);
    scorer.template score<kStages - 1>(now.place(p), members, ring[i % kStages], queries, there);
    there = i + 1 < units && !now.advance(line) && line.slots.products(members.count) == 1;
  }
}

template <class T, class S, int kChunks, int kVectors>
cudaError_t launch(const SelectParams& p) {
  using Units = Traits<T, S, kChunks, kVectors>;
  static const cudaError_t opt_in =
      cudaFuncSetAttribute(score_kernel<Units>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
  if (opt_in != cudaSuccess) return opt_in;
  const auto stream = static_cast<cudaStream_t>(p.pages.stream);
  const int64_t most_units = int64_t{p.pages.batch} * p.pages.num_kv_heads * ceil_div(p.pages.max_columns, kPages);
  if (most_units <= kFewCtasPerSm * Units::kWarps * p.num_sms) {
    return launch_dependent_shared(score_few_kernel<Units>, ceil_div(static_cast<int32_t>(most_units), Units::kWarps),
                                   Units::kThreads, Units::kWarps * sizeof(typename Units::Stage), stream, p,
                                   FewUnits(p));
  }
  return launch_dependent_shared(score_kernel<Units>, kCtasPerSm * p.num_sms, Units::kThreads,
                                 Units::kWarps * sizeof(typename Units::Ring), stream, p);
}

template <class T, class S, int kChunks>
cudaError_t dispatch_vectors(const SelectParams& p) {
  return p.pages.summaries.vectors() == 2 ? launch<T, S, kChunks, 2>(p) : launch<T, S, kChunks, 1>(p);
}

template <class T, class S>
cudaError_t dispatch(const SelectParams& p) {
  const int32_t chunks = ceil_div(p.pages.head_dim, kLanes * kBlock);
  if (chunks <= 2) return dispatch_vectors<T, S, 2>(p);
  if (chunks <= 4) return dispatch_vectors<T, S, 4>(p);
  return chunks <= 8 ? dispatch_vectors<T, S, 8>(p) : cudaErrorInvalidValue;
}

}  // namespace flashcore::score
