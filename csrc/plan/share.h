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
// Requests under policy topk have paths of their own, in which they follow their like through the columns that are
// scored. Each of their stretches there is scored by whoever takes it for all who are in it (summary/score_units.cuh).
//
// What a path or a walk decides is the same for all who are in it, so each request finds its own: no two write the
// same word, and no order matters. A team offers
//   first<kUnroll>(begin, end, f)   the first i in [begin, end) with f(i); end: none. kUnroll: for speed alone
//   sum(n, value)                   the sum of value(i) over i < n
//   leads()                         in one of its threads
// What requests read of each other (`Shareable`, `Path`) is given to them, so that a team may hold copies near by.
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

// What of a request's page table may be packed, or scored together: full page columns, none of a request that stays
// alone.
struct Shareable {
  int32_t begin;
  int32_t columns;  // ~ of those that are scored

  FLASHCORE_HD bool scored() const { return columns < 0; }
  // Columns for a request that is scored or is not; below 0: none, the other kind has them.
  FLASHCORE_HD int32_t columns_for(bool scored) const { return scored ? ~columns : columns; }
};

FLASHCORE_HD Shareable shareable_of(const PlanJob& p, const Request& request, bool fits) {
  const bool may = fits && request.q_len == 1, sparse = is_sparse(p, request);
  if (may && sparse && shares_scores(p)) return {request.page_begin, ~(request.pages - p.sparse.recent_pages)};
  return {request.page_begin, may && !sparse ? request.kv_len / p.by_page : 0};
}

// ---------------------------------------------------------------------------------------------------------------------
// Paths
// ---------------------------------------------------------------------------------------------------------------------

// shareable(i): what of request i may be shared, for every i <= r.
//
// A path of scored columns always ends with the request itself, even if it has none left: scores are made for some
// columns at a time, and those that do not fill the last such unit are not shared.
template <class Team, class ShareableOf>
FLASHCORE_TEAM void trace_path(const PlanJob& p, const Found& found, Team& team, int32_t r,
                               const ShareableOf& shareable) {
  const Shareable own = shareable(r);
  const bool scored = own.scored();
  const int32_t columns = own.columns_for(scored);
  const int32_t* mine = p.plan.kv_indices + own.begin;
  Path path = {-1, 0};  // so far: the request follows `owner` up to column `end`
  for (int32_t round = 0; round < kMaxLevels; ++round) {
    const int32_t fork = path.end;
    int32_t owner = -1;
    const bool follows = path.owner >= 0 && path.owner != r;
    if (scored && follows && (fork == columns || round + 1 == kMaxLevels)) {
      owner = r;
      path.end = columns;
    } else if (fork < columns) {
      const int32_t page = mine[fork];
      // Lower requests than the last owner are not in its class, and so in none of those behind.
      for (owner = path.owner + 1;; ++owner) {  // beyond the first: the same page after other ones
        owner = team.template first<2>(owner, r, [&](int32_t other) {
          const Shareable candidate = shareable(other);
          return fork < candidate.columns_for(scored) && p.plan.kv_indices[candidate.begin + fork] == page;
        });
        path.end = columns;
        if (owner == r) break;
        const Shareable candidate = shareable(owner);
        const int32_t* theirs = p.plan.kv_indices + candidate.begin;
        const int32_t theirs_in_all = candidate.columns_for(scored);
        const int32_t both = columns < theirs_in_all ? columns : theirs_in_all;
        path.end = team.template first<8>(0, both, [&](int32_t column) { return theirs[column] != mine[column]; });
        if (path.end > fork) break;
      }
    }
    path.owner = owner;
    if (!team.leads()) continue;
    const int32_t i = r * kMaxLevels + round;
    found.paths[i] = scored ? Path{-1, 0} : path;
    if (shares_scores(p)) found.scored[i] = scored ? path : Path{-1, 0};
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

// path(round, i) of every request i, and whether it is the owner of another one: followed(round, i).
template <class Team, class PathOf, class Followed>
FLASHCORE_TEAM void walk(const PlanJob& p, const Found& found, const Team& team, int32_t r, const PathOf& path,
                         const Followed& followed) {
  int32_t level = 0;
  int32_t base = 0;  // everything before this column is packed
  int32_t column = 0;
  for (int32_t round = 0; round < kMaxLevels; ++round) {
    const auto [owner, end] = path(round, r);
    if (owner < 0 || (owner == r && !followed(round, r))) break;  // no columns, or none that others read
    while (column < end && level < kMaxLevels) {
      const Edge edge = team.sum(p.batch, [&, owner = owner](int32_t i) {
        const Path other = path(round, i);
        return other.owner == owner && other.end > column ? Edge{1, i < r, other.end} : Edge{};
      });
      column = edge.end;
      if (edge.members == 1 || !pays(p, edge.members, edge.end - base)) continue;
      if (team.leads()) {
        found.chain[r * kMaxLevels + level] = {owner, edge.end, edge.rank, r == owner ? edge.members : 0};
      }
      base = edge.end;
      ++level;
    }
  }
  if (!team.leads()) return;
  found.levels[r] = level;
  found.packed_columns[r] = base;
  for (; level < kMaxLevels; ++level) found.chain[r * kMaxLevels + level] = {};
}

// ---------------------------------------------------------------------------------------------------------------------
// Stretches
// ---------------------------------------------------------------------------------------------------------------------

// Where a stretch of a path stands: behind those of lower owners, and those of the same owner that go on for longer.
struct Place {
  int32_t before = 0;
  int32_t rank = 0;  // of these, those of the same owner
  int32_t next = 0;  // where the next one of the owner ends

  FLASHCORE_HD Place operator+(const Place& other) const {
    return {before + other.before, rank + other.rank, next > other.next ? next : other.next};
  }
};

// All stretches, and page columns.
struct ScoredSum {
  int32_t stretches = 0, shared = 0, columns = 0;

  FLASHCORE_HD ScoredSum operator+(const ScoredSum& other) const {
    return {stretches + other.stretches, shared + other.shared, columns + other.columns};
  }
};

// Requests that are scored together are more spans to look through, each with a last unit that is not whole: that pays
// where most columns are shared.
FLASHCORE_HD bool pays(const ScoredSum& sum) { return 2 * sum.shared >= sum.columns && sum.shared > 0; }

// Writes the stretches that end those of r's path. path(round, i): of every request i, in its scored columns.
template <class Team, class PathOf>
FLASHCORE_TEAM void place_stretches(const PlanJob& p, const Team& team, int32_t r, const PathOf& path) {
  for (int32_t round = 0; round < kMaxLevels; ++round) {
    const Path own = path(round, r);
    if (own.owner < 0) break;
    const Place place = team.sum(p.batch, [&](int32_t i) {
      Place sum;
      for (int32_t k = 0; k < kMaxLevels; ++k) {
        const Path other = path(k, i);
        if (other.owner < 0 || other.owner > own.owner) continue;
        const bool same = other.owner == own.owner;  // at most once on a path
        const bool before = !same || other.end > own.end || (other.end == own.end && i < r);
        sum = sum + Place{before, same && before, !before && i != r ? other.end : 0};
      }
      return sum;
    });
    const int32_t fork = round > 0 ? path(round - 1, r).end : 0;
    if (team.leads()) p.plan.stretches[place.before] = {r, place.rank, place.next > fork ? place.next : fork, own.end};
  }
  if (r > 0) return;
  const ScoredSum sum = team.sum(p.batch, [&](int32_t i) {
    ScoredSum sum;
    for (int32_t k = 0; k < kMaxLevels; ++k) {
      const Path other = path(k, i);
      if (other.owner < 0) continue;
      const int32_t columns = other.end - sum.columns;  // those before it end where it begins
      sum = sum + ScoredSum{1, other.owner != i ? columns : 0, columns};
    }
    return sum;
  });
  if (team.leads()) p.plan.counts[kNumStretches] = pays(sum) ? sum.stretches : 0;
}

}  // namespace flashcore
