// What is scored together: page columns, and the requests that have these pages there.
//
// Unit    16 neighbouring page columns of one KV head, by the query heads of all requests that have these pages there,
//         in slots: a power of two of them for each request, up to 64 in a block of requests.
// Line    all units of a batch: units within blocks of requests, within KV heads, within spans, which are requests, or
//         stretches of pages that requests share (share.h).
#pragma once

#include <bit>

#include "arithmetic.h"
#include "plan/cta.cuh"
#include "summary/rules.h"

namespace flashcore::score {

constexpr int kPages = 16;        // of a unit
constexpr int kSlots = 8;         // query heads of one product
constexpr int kLogMostSlots = 6;  // of a block of requests: eight products by one unit's summaries

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
  __device__ int32_t blocks(const Slots& slots) const { return ceil_div(members, 1 << slots.log_members); }
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

}  // namespace flashcore::score
