// From page tables (and the walks of share.h) to rows, cuts and CTA ranges: everything in a plan that needs a sum over
// what comes before. write.h writes the rest of it, each item by itself.
//
// Team runs it: one CPU thread, or the threads of one CTA. It offers
//   for_each(n, f)       f(i) for every i, finished when it returns
//   scan(n, value, f)    f(i, sum of value(j) for j < i) for every i; returns the whole sum. f(i) follows value(i) in
//                        the same thread, so that the one may leave something for the other in a captured variable
//   beside(values, n)    room for a copy of n values that is quicker to read; values itself where there is none
// so that both produce the same plan from the same source.
#pragma once

#include "plan/share.h"

namespace flashcore {

// What a request adds to the plan: the nodes it owns, and its own rows.
struct RequestSum {
  int32_t node_rows, node_tokens, own_rows, merge_entries;

  FLASHCORE_HD RequestSum operator+(const RequestSum& other) const {
    return {node_rows + other.node_rows, node_tokens + other.node_tokens, own_rows + other.own_rows,
            merge_entries + other.merge_entries};
  }
};

// What a cut adds to the plan.
struct CutSum {
  int32_t cuts, partials;

  FLASHCORE_HD CutSum operator+(const CutSum& other) const { return {cuts + other.cuts, partials + other.partials}; }
};

// The members of a node stand in rows as even as they come, the longer ones first, in the order of their ranks.
struct NodeRows {
  int32_t rows, length, longer;

  FLASHCORE_HD NodeRows(const PlanJob& p, int32_t members) : rows(ceil_div(members, p.by_row)) {
    length = rows > 1 ? members / rows : members;
    longer = members - length * rows;
  }
  FLASHCORE_HD int32_t first(int32_t row) const { return row * length + (row < longer ? row : longer); }
  FLASHCORE_HD int32_t row_of(int32_t rank) const {
    if (rows == 1) return 0;
    const int32_t even = longer * (length + 1);
    return rank < even ? rank / (length + 1) : longer + (rank - even) / length;
  }
};

// What a row adds to the plan, as if the line were not cut.
struct RowSum {
  int64_t cost;
  int32_t pages, tiles, partials;
  int32_t longest;  // work of the longest pair so far

  FLASHCORE_HD RowSum operator+(const RowSum& other) const {
    return {cost + other.cost, pages + other.pages, tiles + other.tiles, partials + other.partials,
            longest > other.longest ? longest : other.longest};
  }
};

// How the pairs of a row are cut without regard to the line: every split_units units.
//
// In deterministic mode: requests of one token (others are short). Else: packed rows, so that those of a node, which
// read the same keys, are cut alike and can read them together; in no more tiles than there are CTAs, and none short.
struct FixedCuts {
  int32_t split_units, tiles;

  FLASHCORE_HD FixedCuts(const PlanJob& p, const Row& row, int32_t units, int32_t num_packed)
      : split_units(units), tiles(1) {
    if (p.split_keys > 0) {
      if (p.plan.qo_indptr[row.request + 1] - p.plan.qo_indptr[row.request] != 1) return;
      split_units = p.split_keys / kSplitUnit;
    } else if (row.flags & kPacked) {
      const int32_t most = p.plan.num_ctas / (num_packed * p.num_kv_heads), enough = ceil_div(units, kMinPackedUnits);
      if (most > 1) split_units = ceil_div(units, most < enough ? most : enough);
    }
    if (split_units < units) tiles = ceil_div(units, split_units);
  }
  // Whether all tiles of the row leave partial results, even if the line cuts none of its pairs.
  FLASHCORE_HD bool merged(const Row& row) const { return tiles > 1 || !(row.flags & kSole); }
};

// The rows a request is in.
struct RequestRows {
  Request request;
  int32_t levels = 0;
  int32_t packed_end = 0;  // first key that is in no packed row

  FLASHCORE_HD RequestRows(const PlanJob& p, const Scratch& s, bool share, int32_t r) : request(request_of(p, r)) {
    if (!share) return;
    levels = s.levels[r];
    packed_end = s.packed_columns[r] * p.page_size;
  }
  FLASHCORE_HD int32_t own_rows(const PlanJob& p) const {
    if (request.q_len == 1) return packed_end == 0 || packed_end < request.kv_len;
    return ceil_div(request.q_len, p.by_row);
  }
  FLASHCORE_HD int32_t merge_entries(const PlanJob& p) const {
    return request.q_len == 1 ? levels + own_rows(p) : request.q_len;
  }
};

// Whether every pair is one tile, if the line does not cut it.
FLASHCORE_HD bool one_tile_each(const PlanJob& p, int32_t num_packed) { return p.split_keys == 0 && num_packed == 0; }

// Tiles of the rows before row i, as if the line were not cut.
FLASHCORE_HD int32_t tiles_before(const PlanJob& p, const Scratch& s, int32_t num_packed, int32_t i) {
  return one_tile_each(p, num_packed) ? i * p.num_kv_heads : s.row_tiles[i];
}

template <class Team>
struct Builder {
  const PlanJob& p;
  const Scratch& s;
  Team& team;
  const bool share;

  FLASHCORE_TEAM Builder(const PlanJob& job, const Scratch& scratch, Team& team)
      : p(job), s(scratch), team(team), share(shares_pages(job)) {}

  FLASHCORE_TEAM void build() {
    if (!fill()) give_up();
  }

 private:
  // False: the plan is larger than its buffers.
  FLASHCORE_TEAM bool fill() {
    const Plan& plan = p.plan;
    const bool fits = batch_fits(p);
    int32_t* node_rows = share ? team.beside(s.node_row, p.batch * kMaxLevels) : nullptr;
    int32_t* request_rows = team.beside(s.request_row, p.batch + 1);
    const RequestSum whole = place_requests(node_rows, request_rows);
    const int32_t num_packed = whole.node_rows, num_rows = num_packed + whole.own_rows;
    if (!fits || num_rows > plan.max_rows || whole.node_tokens > plan.max_row_tokens ||
        whole.merge_entries > plan.max_merge) {
      return false;
    }
    Row* rows = team.beside(plan.rows, num_rows);
    int64_t* row_cost = team.beside(s.row_cost, num_rows + 1);
    const RowSum sum = place_rows(num_rows, num_packed, node_rows, request_rows, rows, row_cost);
    const CutSum cuts = cut_line(rows, row_cost, num_rows, num_packed, sum);
    const int32_t num_tiles = sum.tiles + cuts.cuts, num_partials = sum.partials + cuts.partials;
    if (num_tiles > plan.max_tiles || num_partials > plan.max_partials) return false;
    team.for_each(1, [&](int32_t) {
      plan.tile_indptr[num_rows * p.num_kv_heads] = num_tiles;
      plan.counts[kNumRows] = num_rows;
      plan.counts[kNumTiles] = num_tiles;
      plan.counts[kNumPartials] = num_partials;
      plan.counts[kPagesRead] = sum.pages;
      plan.counts[kPagesDense] = plan.kv_indptr[p.batch];
      plan.counts[kRowsPacked] = num_packed;
      plan.counts[kOverflow] = 0;
      plan.counts[kNextTile] = 0;
      plan.counts[kNextShortTile] = 0;
    });
    return true;
  }

  FLASHCORE_TEAM RequestSum place_requests(int32_t* node_rows, int32_t* request_rows) {
    RequestSum nodes[kMaxLevels];
    const RequestSum sum = team.template scan<RequestSum>(
        p.batch,
        [&](int32_t r) {
          const RequestRows rows(p, s, share, r);
          RequestSum own = {0, 0, rows.own_rows(p), rows.merge_entries(p)};
          for (int32_t level = 0; share && level < kMaxLevels; ++level) {
            const int32_t members = s.members[r * kMaxLevels + level];
            nodes[level] = {NodeRows(p, members).rows, members, 0, 0};
            own = own + nodes[level];
          }
          return own;
        },
        [&](int32_t r, RequestSum before) {
          s.request_row[r] = request_rows[r] = before.own_rows;
          s.request_merge[r] = before.merge_entries;
          for (int32_t level = 0; share && level < kMaxLevels; ++level) {
            const int32_t node = r * kMaxLevels + level;
            s.node_row[node] = node_rows[node] = before.node_rows;
            s.node_token[node] = before.node_tokens;
            before = before + nodes[level];
          }
        });
    team.for_each(1, [&](int32_t) {
      s.request_row[p.batch] = request_rows[p.batch] = sum.own_rows;
      s.request_merge[p.batch] = sum.merge_entries;
    });
    return sum;
  }

  // The rows of nodes, and those of requests behind them.
  FLASHCORE_TEAM RowSum place_rows(int32_t num_rows, int32_t num_packed, const int32_t* node_rows,
                                   const int32_t* request_rows, Row* rows, int64_t* row_cost) {
    const RowSum sum = team.template scan<RowSum>(
        num_rows,
        [&](int32_t i) {
          Row row;
          if (i < num_packed) {
            const int32_t node = find_segment(node_rows, 0, p.batch * kMaxLevels, i);
            row = node_row(node, i - node_rows[node]);
          } else {
            const int32_t r = find_segment(request_rows, 0, p.batch, i - num_packed);
            row = request_row(r, i - num_packed - request_rows[r]);
          }
          p.plan.rows[i] = rows[i] = row;
          const PairWork work = work_of(row, p.group);
          const FixedCuts cuts(p, row, work.units, num_packed);
          const int32_t tiles = cuts.tiles * p.num_kv_heads;
          return RowSum{work.total() * p.num_kv_heads, ceil_div(row.kv_len, p.by_page), tiles,
                        cuts.merged(row) ? tiles * work.packed : 0, static_cast<int32_t>(work.total())};
        },
        [&](int32_t i, const RowSum& before) { store(i, before, row_cost); });
    team.for_each(1, [&](int32_t) { store(num_rows, sum, row_cost); });
    return sum;
  }

  FLASHCORE_TEAM void store(int32_t row, const RowSum& before, int64_t* row_cost) {
    s.row_cost[row] = row_cost[row] = before.cost;
    s.row_tiles[row] = before.tiles;
    s.row_partials[row] = before.partials;
  }

  FLASHCORE_TEAM Row node_row(int32_t node, int32_t i) const {
    const int32_t owner = node / kMaxLevels;
    const NodeRows rows(p, s.members[node]);
    return dense_row(p, request_of(p, owner), owner, s.node_token[node] + rows.first(i),
                     rows.first(i + 1) - rows.first(i), s.chain_begin[node] * p.page_size,
                     s.chain_end[node] * p.page_size, kPacked);
  }

  FLASHCORE_TEAM Row request_row(int32_t r, int32_t i) const {
    const RequestRows rows(p, s, share, r);
    const Request& request = rows.request;
    if (is_sparse(p, request)) return sparse_row(p, request, r);
    if (rows.levels > 0) return dense_row(p, request, r, request.q_begin, 1, rows.packed_end, request.kv_len, 0);
    return own_row(p, request, r, i * tokens_per_row(p));
  }

  // The first tile that a CTA's stretch of the line holds the start of, and the cut there, if there is one.
  struct Start {
    int32_t tile = 0;  // as if the line were not cut
    int32_t pair = 0, unit = 0;
    CutSum cut = {0, 0};  // whether there is a new cut, and the partial results it adds
  };

  FLASHCORE_TEAM Start start_of(const Line& line, const Row* rows, const int64_t* row_cost, int32_t num_rows,
                                int32_t num_packed, const RowSum& sum, int32_t cta) const {
    if (cta >= line.shares || num_rows == 0) return {.tile = sum.tiles};
    if (line.whole > 0) {
      const int32_t pairs = num_rows * p.num_kv_heads, pair = cta * line.whole;
      return {.tile = pair < pairs ? pair : pairs};
    }
    if (line.pieces > 0) return start_of_piece(line, rows, num_rows, cta);
    const int64_t begin = line.begin(cta);
    const int32_t i = find_segment(row_cost, 0, num_rows, begin);
    const Row row = rows[i];
    const PairWork work = work_of(row, p.group);
    const FixedCuts fixed(p, row, work.units, num_packed);
    const int64_t in_row = begin - row_cost[i];
    const int32_t head = static_cast<int32_t>(divide(in_row, work.total()));
    const int32_t in_pair = static_cast<int32_t>(in_row - head * work.total());
    const int32_t unit = ceil_div(in_pair, work.cost);  // the first one at or after the start of the stretch
    const int32_t tile = tiles_before(p, s, num_packed, i) + head * fixed.tiles;
    if (p.split_keys > 0 || i < num_packed) {
      const int32_t k = ceil_div(unit, fixed.split_units);
      return {.tile = tile + (k < fixed.tiles ? k : fixed.tiles)};
    }
    if (unit >= work.units) return {.tile = tile + 1};
    // A CTA whose stretch holds no unit of the pair starts where the next one does.
    const int64_t before = cta > 0 ? begin - line.begin(cta - 1) : 0;
    const bool cuts = unit > 0 && int64_t{unit - 1} * work.cost >= in_pair - before;
    const bool first = in_pair <= before && !fixed.merged(row);  // then the tile before the cut is merged, too
    return {.tile = tile,
            .pair = i * p.num_kv_heads + head,
            .unit = unit,
            .cut = {cuts, cuts ? (first ? 2 : 1) * work.packed : 0}};
  }

  FLASHCORE_TEAM Start start_of_piece(const Line& line, const Row* rows, int32_t num_rows, int32_t cta) const {
    const int32_t pair = cta / line.pieces, piece = cta - pair * line.pieces, i = pair / p.by_head;
    if (i >= num_rows) return {.tile = num_rows * p.num_kv_heads};
    const PairWork work = work_of(rows[i], p.group);
    const int32_t unit = piece * work.units / line.pieces;
    const int32_t unit_before = piece > 0 ? (piece - 1) * work.units / line.pieces : 0;
    const bool cuts = unit > unit_before;  // a pair of fewer units leaves CTAs without
    return {
        .tile = pair, .pair = pair, .unit = unit, .cut = {cuts, cuts ? (unit_before == 0 ? 2 : 1) * work.packed : 0}};
  }

  FLASHCORE_TEAM CutSum cut_line(const Row* rows, const int64_t* row_cost, int32_t num_rows, int32_t num_packed,
                                 const RowSum& sum) {
    Line line(sum.cost, p.plan.num_ctas, p.split_keys == 0);
    if (one_tile_each(p, num_packed) && num_rows > 0) line.cut_by_pairs(num_rows * p.num_kv_heads, sum.longest);
    team.for_each(1, [&](int32_t) { *s.line = line; });
    Start start;
    const CutSum cuts = team.template scan<CutSum>(
        p.plan.num_ctas + 1,
        [&](int32_t cta) {
          start = start_of(line, rows, row_cost, num_rows, num_packed, sum, cta);
          return start.cut;
        },
        [&](int32_t cta, CutSum before) {
          if (start.cut.cuts) {
            s.cut_pair[before.cuts] = start.pair;
            s.cut_unit[before.cuts] = start.unit;
            s.cut_partials[before.cuts] = before.partials;
          }
          const int32_t upto = before.cuts + start.cut.cuts;
          s.cuts_upto[cta] = upto;
          p.plan.cta_indptr[cta] = start.tile + upto;
        });
    team.for_each(1, [&](int32_t) { s.cut_partials[cuts.cuts] = cuts.partials; });
    return cuts;
  }

  // A plan without work, marked unusable.
  FLASHCORE_TEAM void give_up() {
    team.for_each(p.plan.num_ctas + 1, [&](int32_t cta) { p.plan.cta_indptr[cta] = 0; });
    team.for_each(p.num_tokens + 1, [&](int32_t t) { p.plan.merge_indptr[t] = 0; });
    team.for_each(kNumCounts, [&](int32_t slot) { p.plan.counts[slot] = slot == kOverflow; });
  }
};

}  // namespace flashcore
