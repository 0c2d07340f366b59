// The planner's working memory, written anew by every plan.
#pragma once

#include "params.h"
#include "plan/schedule.h"

namespace flashcore {

// Packed rows that a request is in at most, and owners its path has at most: every capacity is known in advance.
constexpr int32_t kMaxLevels = 4;

// A stretch of a request's page columns in which it follows another one, or itself.
struct alignas(8) Path {
  int32_t owner;  // -1: there are no more columns
  int32_t end;    // first column in which it differs from the owner
};

// A node is a stretch of page columns that requests have in common; node = owner * kMaxLevels + level. This is what a
// request's node at a level is to it; its columns begin where those of the level before end.
struct alignas(16) Link {
  int32_t owner;    // request whose page table the node's row reads
  int32_t end;      // page columns
  int32_t rank;     // requests before this one in the node
  int32_t members;  // requests in the node, for its owner; 0 for others
};

// What share.h finds out for build.h and write.h.
struct Found {
  Path* paths;              // [batch, kMaxLevels] the owners that a request follows, one after the other
  Path* scored;             // [batch, kMaxLevels] the same for what policy topk scores; no request has both
  int32_t* levels;          // [batch] nodes the request is in
  int32_t* packed_columns;  // [batch] page columns [0, packed_columns) of the request are in nodes
  Link* chain;              // [batch, kMaxLevels] the nodes of a request, and none behind them; by node for owners
  int64_t size;             // entries in all, a multiple of 4
};

// What build.h sums up for write.h: of every row, cut, CTA, request and node what comes before it. Where there is one
// more entry than items, the last one holds the whole. Every CTA makes these for itself and keeps them beside it.
struct Sums {
  Row* rows;              // [max_rows]
  int64_t* row_cost;      // [max_rows + 1] work on all lines
  Line* line;             // [1] each of the lines
  int32_t* row_tiles;     // [max_rows + 1] tiles, as if no line were cut
  int32_t* row_partials;  // [max_rows + 1] partial results, as if no line were cut
  int32_t* row_split;     // [max_rows] units of a tile, as if no line were cut
  // Where lines are cut inside a pair.
  int32_t* cut_pair;       // [num_ctas]
  int32_t* cut_unit;       // [num_ctas] first unit behind the cut
  int32_t* cut_partials;   // [num_ctas + 1] partial results that the cuts before add
  int32_t* cuts_upto;      // [num_ctas + 1] cuts at or before the start of each CTA's stretch
  int32_t* cta_tile;       // [num_ctas + 1] first tile of each CTA
  int32_t* request_row;    // [batch + 1] rows of its own; those of nodes stand in front of them all
  int32_t* request_merge;  // [batch + 1] entries of merge_rows
  int32_t* node_row;       // [nodes] rows before it
  int32_t* node_token;     // [nodes] entries of row_tokens before it
  int32_t max_rows;
  int64_t size;  // entries in all, a multiple of 4
};

FLASHCORE_HD bool shares_pages(const PlanJob& p) {
  return p.share && p.split_keys == 0 && p.window_left < 0 && p.batch > 1 && tokens_per_row(p) > 1;
}

// Whether requests are looked through for pages that they can have scored together.
FLASHCORE_HD bool shares_scores(const PlanJob& p) {
  return shares_pages(p) && p.policy == Policy::topk && p.plan.max_row_tokens >= kMaxLevels * p.batch;
}

// Hands out pieces of one block of memory.
struct Arena {
  int32_t* begin;
  int64_t used = 0;

  template <class T = int32_t>
  FLASHCORE_HD T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(begin + used);
    used += n * static_cast<int64_t>(sizeof(T) / sizeof(int32_t));
    return piece;
  }
  FLASHCORE_HD int64_t size() const { return (used + 3) / 4 * 4; }
};

FLASHCORE_HD Found found_of(const PlanJob& p) {
  Found found{};
  if (!shares_pages(p)) return found;
  Arena arena{p.scratch};
  const int64_t nodes = static_cast<int64_t>(p.batch) * kMaxLevels;
  found.chain = arena.take<Link>(nodes);
  found.paths = arena.take<Path>(nodes);
  if (shares_scores(p)) found.scored = arena.take<Path>(nodes);
  found.levels = arena.take(p.batch);
  found.packed_columns = arena.take(p.batch);
  found.size = arena.size();
  return found;
}

// Rows that the batch can have. A row of a request ends with it or is full, and holds a token. Nodes are fewer than
// requests: where one ends its requests part, so that they make a tree with requests at the leaves. A row of a node is
// its last or is full, and a request is in kMaxLevels nodes at most.
FLASHCORE_HD int32_t most_rows(const PlanJob& p) {
  const int32_t ends = p.batch + p.num_tokens / p.by_row, own = ends < p.num_tokens ? ends : p.num_tokens;
  const int32_t packed = shares_pages(p) ? p.batch + kMaxLevels * p.batch / p.by_small_row : 0;
  return own + packed < p.plan.max_rows ? own + packed : p.plan.max_rows;
}

FLASHCORE_HD Sums sums_of(const PlanJob& p, int32_t* memory) {
  Sums s{};
  Arena arena{memory};
  const int64_t ctas = static_cast<int64_t>(p.plan.num_ctas) + 1;
  s.max_rows = most_rows(p);
  s.rows = arena.take<Row>(s.max_rows);
  s.row_cost = arena.take<int64_t>(s.max_rows + 1);
  s.line = arena.take<Line>(1);
  s.row_tiles = arena.take(s.max_rows + 1);
  s.row_partials = arena.take(s.max_rows + 1);
  s.row_split = arena.take(s.max_rows);
  s.cut_pair = arena.take(ctas);
  s.cut_unit = arena.take(ctas);
  s.cut_partials = arena.take(ctas);
  s.cuts_upto = arena.take(ctas);
  s.cta_tile = arena.take(ctas);
  s.request_row = arena.take(p.batch + 1);
  s.request_merge = arena.take(p.batch + 1);
  if (shares_pages(p)) {
    s.node_row = arena.take(static_cast<int64_t>(p.batch) * kMaxLevels);
    s.node_token = arena.take(static_cast<int64_t>(p.batch) * kMaxLevels);
  }
  s.size = arena.size();
  return s;
}

}  // namespace flashcore
