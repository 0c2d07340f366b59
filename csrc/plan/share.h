// Shared prefixes: which stretches of page columns requests have in common, and whether packing them pays.
//
// Each page in a full column of a request of one query token is counted and gets an owner, the lowest request that has
// it. Along a request's page table, a run of columns with one owner and one count is an edge of the radix tree of all
// tables. A walk down the columns collects the edges that pay as nodes (owner, [begin, end)); an edge that does not pay
// is joined to the next one that does, so that a small common start never hides a large shared document behind it.
//
// Nothing of this assumes a tree. A request is in a node only if each of its pages there equals the owner's, column by
// column, and if the owner's own walk found the same node: so the rows are exact for every page table there can be.
#pragma once

#include "plan/scratch.h"

namespace flashcore {

// Reading a key once instead of `members` times saves (members - 1) reads; packing costs a tile's start and one more
// partial result for each member: group x head_dim floats written and read against a key's 2 x head_dim halves, which
// is 2 x group keys. The start was put at 3 us of one H200's memory, 24576 keys of one head of 128 channels, so that
// 8 requests with 8 KV heads break even just below a prefix of 512 keys.
constexpr int64_t kStartKeys = 24576;

FLASHCORE_HD bool pays(const PlanParams& p, int32_t members, int32_t columns) {
  const int64_t saved = static_cast<int64_t>(members - 1) * columns * p.page_size * p.num_kv_heads;
  const int64_t merged = static_cast<int64_t>(members) * 2 * p.group * p.num_kv_heads;
  return saved > kStartKeys + merged;
}

// Full page columns of a request that may be packed; 0 for one that stays alone.
FLASHCORE_HD int32_t shareable_columns(const PlanParams& p, const Request& request) {
  return request.q_len == 1 && !is_sparse(p, request) ? request.kv_len / p.page_size : 0;
}

// Owner and count of a column; owner -1: no other request is known to have this page in this column.
struct Edge {
  int32_t owner, count;

  FLASHCORE_HD bool operator==(const Edge& other) const { return owner == other.owner && count == other.count; }
};

FLASHCORE_HD Edge edge_of(const PlanParams& p, const Scratch& s, const Request& request, int32_t column) {
  constexpr Edge kNone{-1, 0};
  const int32_t page = p.plan.kv_indices[request.page_begin + column];
  if (page < 0 || page >= p.num_pages || s.count[page] < 2) return kNone;
  const int32_t owner = p.batch - s.owner[page];
  const Request other = request_of(p, owner);
  const bool same = column < shareable_columns(p, other) && p.plan.kv_indices[other.page_begin + column] == page;
  return same ? Edge{owner, s.count[page]} : kNone;
}

// The walk of one request. Lanes: one thread (CPU) or the lanes of a warp that take every step together.
template <class Lanes>
struct Walk {
  const PlanParams& p;
  const Scratch& s;
  const Lanes& lanes;
  int32_t r;
  Request request;
  int32_t base = 0;       // everything before this column is packed
  int32_t run_begin = 0;  // first column of the current edge
  Edge edge{-1, 0};
  int32_t level = 0;

  // The edge ends before `column`. False: the walk is over.
  FLASHCORE_TEAM bool close(int32_t column) {
    if (column == run_begin || !pays(p, edge.count, column - base)) return true;
    if (!agrees(base, run_begin)) return false;
    if (lanes.first()) {
      const int32_t at = r * kMaxLevels + level;
      s.chain_owner[at] = edge.owner;
      s.chain_begin[at] = base;
      s.chain_end[at] = column;
    }
    base = column;
    return ++level < kMaxLevels;
  }
  FLASHCORE_TEAM void open(int32_t column, Edge next) {
    run_begin = column;
    edge = next;
  }
  FLASHCORE_TEAM void finish() {
    if (lanes.first()) s.chain_len[r] = level;
  }
  // Whether the columns [begin, end) that the node joins to its edge are the owner's too.
  FLASHCORE_TEAM bool agrees(int32_t begin, int32_t end) const {
    const int32_t* mine = p.plan.kv_indices + request.page_begin;
    const int32_t* owners = p.plan.kv_indices + p.plan.kv_indptr[edge.owner];
    bool same = true;
    for (int32_t column = begin + lanes.index(); column < end; column += lanes.count()) {
      same = same && mine[column] == owners[column];
    }
    return lanes.all(same);
  }
};

// How many nodes of a request's walk their owners found as well.
FLASHCORE_HD int32_t confirmed_levels(const Scratch& s, int32_t r) {
  int32_t level = 0;
  for (; level < s.chain_len[r]; ++level) {
    const int32_t at = r * kMaxLevels + level, owner = s.chain_owner[at];
    const int32_t theirs = owner * kMaxLevels + level;
    if (level >= s.chain_len[owner] || s.chain_owner[theirs] != owner) break;
    if (s.chain_begin[theirs] != s.chain_begin[at] || s.chain_end[theirs] != s.chain_end[at]) break;
  }
  return level;
}

}  // namespace flashcore
