// The plan, written item by item once build.h has made its sums. All items are independent of each other.
#pragma once

#include "plan/build.h"

namespace flashcore {

struct Writer {
  const PlanJob& p;
  const Found& found;
  const Sums& s;
  const Totals& total;

  FLASHCORE_TEAM Writer(const PlanJob& job, const Found& found, const Sums& sums, const Totals& totals)
      : p(job), found(found), s(sums), total(totals) {}

  // Calls each(n, f) with the number of items of every kind and what writes the i-th of them.
  template <class Each>
  FLASHCORE_TEAM void write(const Each& each) const {
    each(total.uncut, [&](int32_t uncut) { write_uncut(uncut); });
    each(total.cuts, [&](int32_t cut) { write_cut(cut); });
    each(p.num_tokens + 1, [&](int32_t t) { write_token(t); });
    each(total.fits ? total.rows : 0, [&](int32_t i) { p.plan.rows[i] = s.rows[i]; });
    each(p.plan.num_ctas + 1, [&](int32_t cta) { p.plan.cta_indptr[cta] = total.fits ? s.cta_tile[cta] : 0; });
    each(total.fits && p.policy == Policy::window ? p.batch * p.sparse.list_pages : 0,
         [&](int32_t i) { write_listed(i); });
    each(1, [&](int32_t) { write_counts(); });
  }

 private:
  // A token's position and merge entries, and its place in packed rows.
  FLASHCORE_TEAM void write_token(int32_t t) const {
    const Plan& plan = p.plan;
    if (!total.fits) {
      plan.merge_indptr[t] = 0;
      return;
    }
    if (t >= plan.qo_indptr[p.batch]) {  // padding: in no row
      plan.merge_indptr[t] = s.request_merge[p.batch];
      if (t < p.num_tokens) plan.positions[t] = 0;
      return;
    }
    const int32_t r = request_of_token(t);
    const RequestRows rows(p, found, total.share, r);
    const Request& request = rows.request;
    const int32_t i = t - request.q_begin, row = total.packed_rows + s.request_row[r];
    int32_t entry = s.request_merge[r] + i * (request.q_len > 1);
    plan.merge_indptr[t] = entry;
    plan.positions[t] = request.kv_len - request.q_len + i;
    for (int32_t level = 0; level < rows.levels; ++level) {
      const Link link = found.chain[r * kMaxLevels + level];
      const int32_t node = link.owner * kMaxLevels + level, rank = link.rank;
      const NodeRows in_node(p, total.small_rows, found.chain[node].members);
      const int32_t i_row = in_node.row_of(rank);
      plan.row_tokens[s.node_token[node] + rank] = t;
      write_merge(entry++, s.node_row[node] + i_row, rank - in_node.first(i_row));
    }
    const int32_t i_row = i / p.by_row;
    if (rows.own_rows(p) > 0) write_merge(entry, row + i_row, i - i_row * tokens_per_row(p));
  }

  // The tiles as they were if no line were cut, each up to the first cut in it.
  FLASHCORE_TEAM void write_uncut(int32_t uncut) const {
    const Plan& plan = p.plan;
    const Lines& lines = total.lines;
    const int32_t line_tiles = lines.part(p, total.uncut), line = lines.count == 1 ? 0 : uncut / line_tiles;
    const int32_t of_line = uncut - line * line_tiles, of_all = of_line * lines.count;
    const int32_t i = total.one_tile_each(p) ? of_all / p.by_head : find_segment(s.row_tiles, 0, total.rows, of_all);
    const Row& row = s.rows[i];
    const PairWork work = work_of(row, p.group);
    const FixedCuts fixed(p, s, i);
    const int32_t in_row = of_line - lines.part(p, s.row_tiles[i]);
    const int32_t turn = fixed.tiles > 1 ? in_row / fixed.tiles : in_row, k = in_row - turn * fixed.tiles;
    const int32_t head = lines.head(line, turn), pair = i * p.num_kv_heads + head;

    const int64_t at = lines.part_of_work(s.row_cost[i]) + turn * work.total();
    const int32_t cut = s.cuts_upto[line * lines.ctas + s.line->cta_of(i * lines.in_turn + turn, at)];
    const bool is_cut = cut < total.cuts && s.cut_pair[cut] == pair;
    const bool merged = is_cut || fixed.merged(row);
    const int32_t end = (is_cut ? s.cut_unit[cut] : (k + 1) * fixed.split_units) * kSplitUnit;
    plan.tiles[uncut + cut] =
        tile_of(row, pair, head, k * fixed.split_units * kSplitUnit, end < row.kv_len ? end : row.kv_len,
                merged ? partial_of(row, work, i, line, in_row) + s.cut_partials[cut] : -1);
    if (k == 0) plan.pair_tiles[2 * pair] = uncut + cut;
    if (k + 1 == fixed.tiles && !is_cut) plan.pair_tiles[2 * pair + 1] = uncut + cut + 1;
  }

  // The tile behind a cut of a line.
  FLASHCORE_TEAM void write_cut(int32_t cut) const {
    const Lines& lines = total.lines;
    const int32_t pair = s.cut_pair[cut], i = pair / p.by_head, head = pair - i * p.num_kv_heads;
    const Row& row = s.rows[i];
    const PairWork work = work_of(row, p.group);
    const bool first = cut == 0 || s.cut_pair[cut - 1] != pair;
    const bool last = cut + 1 == total.cuts || s.cut_pair[cut + 1] != pair;
    // The tile in front of the pair's first cut is counted with the row or else with that cut.
    const bool behind_first = first || !(row.flags & kSole);
    const int32_t turn = lines.part(p, head), line = lines.line_of(head, turn);
    const int32_t tile = lines.part(p, line * total.uncut + s.row_tiles[i]) + turn + cut + 1;
    p.plan.tiles[tile] =
        tile_of(row, pair, head, s.cut_unit[cut] * kSplitUnit, last ? row.kv_len : s.cut_unit[cut + 1] * kSplitUnit,
                partial_of(row, work, i, line, turn) + s.cut_partials[cut] + (behind_first ? work.packed : 0));
    if (last) p.plan.pair_tiles[2 * pair + 1] = tile + 1;
  }

  // An entry of the page list of a request: the sink pages, then the recent ones.
  FLASHCORE_TEAM void write_listed(int32_t i) const {
    const int32_t pages = p.sparse.list_pages, r = i / pages, k = i % pages;
    const Request request = request_of(p, r);
    if (!is_sparse(p, request)) return;
    const int32_t column = k < p.sparse.sink_pages ? k : request.pages - pages + k;
    p.plan.kv_indices[list_begin(p, r) + k] = p.plan.kv_indices[request.page_begin + column];
  }

  FLASHCORE_TEAM void write_counts() const {
    int32_t* counts = p.plan.counts;
    if (!total.fits) {
      for (int32_t slot = 0; slot < kNumCounts; ++slot) counts[slot] = slot == kOverflow;
      return;
    }
    counts[kNumRows] = total.rows;
    counts[kNumTiles] = total.tiles();
    counts[kNumPartials] = total.partials;
    counts[kPagesRead] = total.pages;
    counts[kPagesDense] = p.plan.kv_indptr[p.batch];
    counts[kRowsPacked] = total.packed_rows;
    counts[kPackedShare] = total.packed_share;
    counts[kOverflow] = 0;
    counts[kNextTile] = 0;
    counts[kNextShortTile] = 0;
    if (!shares_scores(p)) counts[kNumStretches] = 0;
  }

  FLASHCORE_TEAM int32_t request_of_token(int32_t t) const {
    const int32_t* indptr = p.plan.qo_indptr;
    const bool one_token_each = t < p.batch && indptr[t] == t && indptr[t + 1] == t + 1;  // up to t
    return one_token_each ? t : find_segment(indptr, 0, p.batch, t);
  }

  FLASHCORE_TEAM void write_merge(int32_t entry, int32_t row, int32_t token_in_row) const {
    p.plan.merge_rows[2 * entry] = row;
    p.plan.merge_rows[2 * entry + 1] = token_in_row;
  }

  FLASHCORE_TEAM Tile tile_of(const Row& row, int32_t pair, int32_t head, int32_t begin, int32_t end,
                              int32_t partial) const {
    return {.pair = pair,
            .kv_begin = begin,
            .kv_end = end,
            .partial = partial,
            .page_begin = row.page_begin + head * row.head_stride,
            .q_begin = row.flags & kPacked ? ~row.q_begin : row.q_begin,
            .q_count = row.q_count,
            .kv_pos = row.kv_pos};
  }

  // First partial result of tile number in_row of a row on a line, those that cuts add aside.
  FLASHCORE_TEAM int32_t partial_of(const Row& row, const PairWork& work, int32_t i, int32_t line,
                                    int32_t in_row) const {
    const FixedCuts fixed(p, s, i);
    return total.lines.part(p, line * s.row_partials[total.rows] + s.row_partials[i]) +
           (fixed.merged(row) ? in_row * work.packed : 0);
  }
};

}  // namespace flashcore
