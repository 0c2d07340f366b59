// Shared prefixes: which stretches of page columns requests have in common, and whether packing them pays.
//
// Requests with the same first page are a class, and the lowest of them owns it. Every request follows its class' owner
// as long as their pages agree, column by column. Where it leaves, the requests that have all its pages up to there and
// that one in common are a class again, and so on, at most kMaxLevels times. Equality is checked page by page, whatever
// the tables are: nothing assumes that they are prefix trees. For those that are, the owners' stretches between the
// columns where requests leave are the edges of the radix tree.
//
// A walk down a request's path collects the edges that pay as nodes (owner, [begin, end)); an edge that does not pay is
// joined to the next one that does, so that a small common start never hides a large shared document behind it.
//
// What a path or a walk decides is the same for all who are in it, so each request finds its own: no two write the
// same word, and no order matters. A team offers
//   first<kUnroll>(begin, end, f)   the first i in [begin, end) with f(i); end: none. kUnroll: for speed alone
//   sum(n, value)                   the sum of value(i) over i < n
//   leads()                         in one of its threads
#pragma once

#include "plan/scratch.h"

namespace flashcore {

// Reading a key once instead of `members` times saves (members - 1) reads; packing costs a tile's start and one more
// partial result for each member: group x head_dim floats written and read against a key's 2 x head_dim halves, which
// is 2 x group keys. The start was put at 3 us of one H200's memory, 24576 keys of one head of 128 channels, so that
// 8 requests with 8 KV heads break even just below a prefix of 512 keys.
constexpr int64_t kStartKeys = 24576;

FLASHCORE_HD bool pays(const PlanJob& p, int32_t members, int32_t columns) {
  const int64_t saved = static_cast<int64_t>(members - 1) * columns * p.page_size * p.num_kv_heads;
  const int64_t merged = static_cast<int64_t>(members) * 2 * p.group * p.num_kv_heads;
  return saved > kStartKeys + merged;
}

// Full page columns of a request that may be packed; 0 for one that stays alone.
FLASHCORE_HD int32_t shareable_columns(const PlanJob& p, const Request& request) {
  return request.q_len == 1 && !is_sparse(p, request) ? request.kv_len / p.by_page : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Paths
// ---------------------------------------------------------------------------------------------------------------------

template <class Team>
FLASHCORE_TEAM void trace_path(const PlanJob& p, const Scratch& s, Team& team, int32_t r) {
  const Request request = request_of(p, r);
  const int32_t columns = batch_fits(p) ? shareable_columns(p, request) : 0;
  const int32_t* mine = p.plan.kv_indices + request.page_begin;
  int32_t owner = -1, end = 0;  // the path so far: the request follows `owner` up to column `end`
  for (int32_t round = 0; round < kMaxLevels; ++round) {
    const int32_t fork = end;
    const int32_t page = fork < columns ? mine[fork] : -1;
    // Lower requests than the last owner are not in its class, and so in none of those behind.
    owner = fork < columns ? owner + 1 : -1;
    while (fork < columns) {
      owner = team.template first<2>(owner, r, [&](int32_t other) {
        const Request candidate = request_of(p, other);
        return fork < shareable_columns(p, candidate) && p.plan.kv_indices[candidate.page_begin + fork] == page;
      });
      end = columns;
      if (owner == r) break;
      const Request candidate = request_of(p, owner);
      const int32_t theirs = shareable_columns(p, candidate);
      end = team.template first<8>(0, columns < theirs ? columns : theirs, [&](int32_t column) {
        return p.plan.kv_indices[candidate.page_begin + column] != mine[column];
      });
      if (end > fork) break;
      ++owner;  // the same page after other ones
    }
    if (!team.leads()) continue;
    s.path_owner[round * p.batch + r] = owner;
    s.path_end[round * p.batch + r] = end;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Walks
// ---------------------------------------------------------------------------------------------------------------------

// The requests that follow an owner beyond some column, up to the column where the first of them leaves.
struct Edge {
  int32_t members = 0;
  int32_t rank = 0;  // members before the request that asks
  int32_t end = INT32_MAX;

  FLASHCORE_HD Edge operator+(const Edge& other) const {
    return {members + other.members, rank + other.rank, end < other.end ? end : other.end};
  }
};

template <class Team>
FLASHCORE_TEAM void walk(const PlanJob& p, const Scratch& s, const Team& team, int32_t r) {
  int32_t path_owner[kMaxLevels], path_end[kMaxLevels];
  for (int32_t round = 0; round < kMaxLevels; ++round) {
    path_owner[round] = s.path_owner[round * p.batch + r];
    path_end[round] = s.path_end[round * p.batch + r];
  }
  int32_t level = 0;
  int32_t base = 0;  // everything before this column is packed
  int32_t column = 0;
  for (int32_t round = 0; round < kMaxLevels; ++round) {
    const int32_t* owners = s.path_owner + round * p.batch;
    const int32_t* ends = s.path_end + round * p.batch;
    const int32_t owner = path_owner[round], end = path_end[round];
    if (owner < 0) break;
    while (column < end && level < kMaxLevels) {
      const Edge edge = team.sum(p.batch, [&](int32_t other) {
        const bool follows = (owners[other] == owner) & (ends[other] > column);  // &: loaded side by side
        return follows ? Edge{1, other < r, ends[other]} : Edge{};
      });
      column = edge.end;
      if (edge.members == 1 || !pays(p, edge.members, edge.end - base)) continue;
      if (team.leads()) {
        const int32_t at = r * kMaxLevels + level;
        s.chain_owner[at] = owner;
        s.chain_begin[at] = base;
        s.chain_end[at] = edge.end;
        s.chain_rank[at] = edge.rank;
        s.members[at] = r == owner ? edge.members : 0;
      }
      base = edge.end;
      ++level;
    }
  }
  if (!team.leads()) return;
  s.levels[r] = level;
  s.packed_columns[r] = base;
  for (; level < kMaxLevels; ++level) s.members[r * kMaxLevels + level] = 0;
}

}  // namespace flashcore
