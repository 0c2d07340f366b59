// From page tables (and the walks of share.h) to a whole plan, in data-parallel steps.
//
// Team runs them: one CPU thread, or the threads of one CTA. It offers
//   for_each(n, f)             f(i) for every i, finished when it returns
//   scan(n, value, f)          f(i, sum of value(j) for j < i) for every i; returns the whole sum
//   rank(n, key, f)            f(i, how many j < i have the same key), counted on in counter[key]; keys < 0 are left
//   out
// so that both produce the same plan from the same source.
#pragma once

#include "plan/share.h"

namespace flashcore {

// Two counts that are summed together.
struct Two {
  int32_t first, second;

  FLASHCORE_HD Two operator+(const Two& other) const { return {first + other.first, second + other.second}; }
};

// The members of a node stand in rows as even as they come, in the order of their ranks.
struct NodeRows {
  int32_t members, rows;

  FLASHCORE_HD NodeRows(const PlanParams& p, int32_t members)
      : members(members), rows(ceil_div(members, tokens_per_row(p))) {}
  FLASHCORE_HD int32_t first(int32_t row) const { return static_cast<int32_t>(int64_t{members} * row / rows); }
  FLASHCORE_HD int32_t row_of(int32_t rank) const {
    return static_cast<int32_t>((static_cast<int64_t>(rank + 1) * rows - 1) / members);
  }
};

template <class Team>
struct Builder {
  const PlanParams& p;
  const Scratch s;
  Team& team;
  const bool share;

  FLASHCORE_TEAM Builder(const PlanParams& params, Team& team)
      : p(params), s(scratch_of(params)), team(team), share(shares_pages(params)) {}

  FLASHCORE_TEAM void build() {
    const Plan& plan = p.plan;
    if (!batch_fits(p)) return give_up();
    const Two packed = share ? pack_nodes() : Two{0, 0};
    const Two own = place_requests(packed.first);
    const int32_t num_rows = packed.first + own.first, num_merge = own.second;
    if (num_rows > plan.max_rows || packed.second > plan.max_row_tokens || num_merge > plan.max_merge) return give_up();
    if (share) write_node_rows();
    if (p.policy == Policy::window) write_window_lists();
    write_tokens(plan.qo_indptr[p.batch], num_merge);
    cut_tiles(num_rows, packed.first);
  }

 private:
  FLASHCORE_TEAM int32_t levels_of(int32_t r) const { return share ? s.levels[r] : 0; }

  // First key of a request that is in no packed row.
  FLASHCORE_TEAM int32_t packed_end(int32_t r) const {
    const int32_t levels = levels_of(r);
    return levels > 0 ? s.chain_end[r * kMaxLevels + levels - 1] * p.page_size : 0;
  }

  FLASHCORE_TEAM int32_t own_rows(int32_t r, const Request& request) const {
    if (request.q_len == 1) return packed_end(r) == 0 || packed_end(r) < request.kv_len;
    return ceil_div(request.q_len, tokens_per_row(p));
  }

  // Settles who is in which node; returns the rows and the entries of row_tokens of all nodes.
  FLASHCORE_TEAM Two pack_nodes() {
    const int32_t num_nodes = p.batch * kMaxLevels;
    team.for_each(p.batch, [&](int32_t r) {
      s.levels[r] = confirmed_levels(s, r);
      for (int32_t level = 0; level < kMaxLevels; ++level) s.members[r * kMaxLevels + level] = 0;
    });
    // A node has the same level in all its members, so levels can be counted side by side.
    team.rank(
        p.batch, kMaxLevels,
        [&](int32_t r, int32_t level) {
          return level < s.levels[r] ? s.chain_owner[r * kMaxLevels + level] * kMaxLevels + level : -1;
        },
        s.members, [&](int32_t r, int32_t level, int32_t rank) { s.chain_rank[r * kMaxLevels + level] = rank; });
    return team.template scan<Two>(
        num_nodes, [&](int32_t node) { return Two{NodeRows(p, s.members[node]).rows, s.members[node]}; },
        [&](int32_t node, Two before) {
          s.node_row[node] = before.first;
          s.node_token[node] = before.second;
        });
  }

  // Numbers the rows and merge entries of each request behind those of the nodes.
  FLASHCORE_TEAM Two place_requests(int32_t first_row) {
    return team.template scan<Two>(
        p.batch,
        [&](int32_t r) {
          const Request request = request_of(p, r);
          const int32_t rows = own_rows(r, request);
          return Two{rows, request.q_len == 1 ? levels_of(r) + rows : request.q_len};
        },
        [&](int32_t r, Two before) {
          s.request_row[r] = first_row + before.first;
          s.request_merge[r] = before.second;
        });
  }

  FLASHCORE_TEAM void write_node_rows() {
    team.for_each(p.batch * kMaxLevels, [&](int32_t node) {
      const NodeRows rows(p, s.members[node]);
      const int32_t owner = node / kMaxLevels;
      for (int32_t i = 0; i < rows.rows; ++i) {
        const int32_t first = rows.first(i), count = rows.first(i + 1) - first;
        p.plan.rows[s.node_row[node] + i] =
            dense_row(p, request_of(p, owner), owner, s.node_token[node] + first, count,
                      s.chain_begin[node] * p.page_size, s.chain_end[node] * p.page_size, kPacked);
      }
    });
  }

  FLASHCORE_TEAM void write_window_lists() {
    const int32_t pages = sparse_pages(p);
    team.for_each(p.batch * pages, [&](int32_t i) {
      const int32_t r = i / pages, k = i % pages;
      const Request request = request_of(p, r);
      if (!is_sparse(p, request)) return;
      const int32_t column = k < p.sink_pages ? k : request.pages - pages + k;
      p.plan.kv_indices[list_begin(p, r) + k] = p.plan.kv_indices[request.page_begin + column];
    });
  }

  FLASHCORE_TEAM void write_tokens(int32_t tokens, int32_t num_merge) {
    team.for_each(p.num_tokens + 1, [&](int32_t t) {
      if (t < tokens) {
        write_token(t);
      } else {  // padding: in no row
        p.plan.merge_indptr[t] = num_merge;
        if (t < p.num_tokens) p.plan.positions[t] = 0;
      }
    });
  }

  // A token's position, its merge entries, and the row that begins with it.
  FLASHCORE_TEAM void write_token(int32_t t) {
    const Plan& plan = p.plan;
    const int32_t r = find_segment(plan.qo_indptr, 0, p.batch, t);
    const Request request = request_of(p, r);
    const int32_t i = t - request.q_begin, most = tokens_per_row(p);
    plan.positions[t] = request.kv_len - request.q_len + i;
    int32_t row = s.request_row[r];
    if (request.q_len > 1) {
      const int32_t entry = s.request_merge[r] + i;
      plan.merge_indptr[t] = entry;
      write_merge(entry, row + i / most, i % most);
      if (i % most == 0) plan.rows[row + i / most] = own_row(p, request, r, i);
      return;
    }
    int32_t entry = s.request_merge[r];
    plan.merge_indptr[t] = entry;
    for (int32_t level = 0; level < levels_of(r); ++level) {
      const int32_t at = r * kMaxLevels + level, node = s.chain_owner[at] * kMaxLevels + level;
      const int32_t rank = s.chain_rank[at];
      const NodeRows rows(p, s.members[node]);
      const int32_t i_row = rows.row_of(rank);
      plan.row_tokens[s.node_token[node] + rank] = t;
      write_merge(entry++, s.node_row[node] + i_row, rank - rows.first(i_row));
    }
    if (own_rows(r, request) == 0) return;
    write_merge(entry, row, 0);
    if (is_sparse(p, request)) {
      plan.rows[row] = sparse_row(p, request, r);
    } else if (levels_of(r) > 0) {
      plan.rows[row] = dense_row(p, request, r, t, 1, packed_end(r), request.kv_len, 0);
    } else {
      plan.rows[row] = own_row(p, request, r, 0);
    }
  }

  FLASHCORE_TEAM void write_merge(int32_t entry, int32_t row, int32_t token_in_row) {
    p.plan.merge_rows[2 * entry] = row;
    p.plan.merge_rows[2 * entry + 1] = token_in_row;
  }

  FLASHCORE_TEAM Cut cut_of(const Line& line, int32_t pair) const {
    const int32_t row = pair / p.num_kv_heads, head = pair % p.num_kv_heads;
    const Row& r = p.plan.rows[row];
    const PairWork work = work_of(r, p.group);
    // Rows of several tokens are many; only requests of one token are long enough to need fixed cuts.
    const bool fixed = p.split_keys > 0;
    const bool one_token = fixed && p.plan.qo_indptr[r.request + 1] - p.plan.qo_indptr[r.request] == 1;
    const int32_t split_units = !fixed ? 0 : one_token ? p.split_keys / kSplitUnit : work.units;
    return Cut(line, work, s.row_cost[row] + head * work.total(), split_units);
  }

  FLASHCORE_TEAM void cut_tiles(int32_t num_rows, int32_t num_packed_rows) {
    const Plan& plan = p.plan;
    const int64_t work = team.template scan<int64_t>(
        num_rows, [&](int32_t row) { return p.num_kv_heads * work_of(plan.rows[row], p.group).total(); },
        [&](int32_t row, int64_t before) { s.row_cost[row] = before; });
    const int64_t pages_read = team.template scan<int64_t>(
        num_rows, [&](int32_t row) { return int64_t{ceil_div(plan.rows[row].kv_len, p.page_size)}; },
        [](int32_t, int64_t) {});
    const Line line(work, plan.num_ctas, p.split_keys == 0);

    // Where each pair's tiles and partials start; the first tile keeps the latter until the tiles are written.
    const int32_t num_pairs = num_rows * p.num_kv_heads;
    const Two sum = team.template scan<Two>(
        num_pairs,
        [&](int32_t pair) {
          const Cut cut = cut_of(line, pair);
          const int32_t tiles = cut.num_tiles();
          const bool direct = tiles == 1 && (plan.rows[pair / p.num_kv_heads].flags & kSole);
          return Two{tiles, direct ? 0 : tiles * cut.work.packed};
        },
        [&](int32_t pair, Two before) {
          plan.tile_indptr[pair] = before.first;
          if (before.first < plan.max_tiles) plan.tiles[before.first].partial = before.second;
        });
    if (sum.first > plan.max_tiles || sum.second > plan.max_partials) return give_up();
    team.for_each(1, [&](int32_t) { plan.tile_indptr[num_pairs] = sum.first; });
    team.for_each(sum.first, [&](int32_t tile) { write_tile(line, num_pairs, tile); });
    finish(num_rows, num_packed_rows, sum, pages_read, line);
  }

  FLASHCORE_TEAM void write_tile(const Line& line, int32_t num_pairs, int32_t tile) {
    const Plan& plan = p.plan;
    // Balanced tiles outnumber their pairs by less than a tile for each CTA.
    const int32_t most = tile < num_pairs ? tile + 1 : num_pairs;
    const int32_t least = p.split_keys == 0 && tile > plan.num_ctas ? tile - plan.num_ctas : 0;
    const int32_t pair = find_segment(plan.tile_indptr, least, most, tile);
    const int32_t first = plan.tile_indptr[pair], k = tile - first, num_tiles = plan.tile_indptr[pair + 1] - first;
    const Row& row = plan.rows[pair / p.num_kv_heads];
    const Cut cut = cut_of(line, pair);
    const int32_t end = cut.first_unit(k + 1) * kSplitUnit;
    const bool direct = num_tiles == 1 && (row.flags & kSole);
    Tile& t = plan.tiles[tile];
    t.pair = pair;
    t.kv_begin = cut.first_unit(k) * kSplitUnit;
    t.kv_end = k + 1 < num_tiles && end < row.kv_len ? end : row.kv_len;
    if (direct) {
      t.partial = -1;
    } else if (k > 0) {
      t.partial = plan.tiles[first].partial + k * cut.work.packed;
    }
    // CTAs after the previous tile's, up to this one's, start here.
    int32_t before = -1;
    if (k > 0) {
      before = cut.cta_of_tile(k - 1);
    } else if (pair > 0) {
      const Cut previous = cut_of(line, pair - 1);
      before = previous.cta_of_tile(first - plan.tile_indptr[pair - 1] - 1);
    }
    for (int32_t cta = before + 1; cta <= cut.cta_of_tile(k); ++cta) plan.cta_indptr[cta] = tile;
  }

  FLASHCORE_TEAM void finish(int32_t num_rows, int32_t num_packed_rows, Two sum, int64_t pages_read, const Line& line) {
    const Plan& plan = p.plan;
    // CTAs behind the last tile's have none.
    int32_t last = -1;
    if (num_rows > 0) {
      const int32_t pair = num_rows * p.num_kv_heads - 1;
      last = cut_of(line, pair).cta_of_tile(sum.first - plan.tile_indptr[pair] - 1);
    }
    team.for_each(plan.num_ctas - last, [&](int32_t i) { plan.cta_indptr[last + 1 + i] = sum.first; });
    team.for_each(1, [&](int32_t) {
      plan.counts[kNumRows] = num_rows;
      plan.counts[kNumTiles] = sum.first;
      plan.counts[kNumPartials] = sum.second;
      plan.counts[kPagesRead] = static_cast<int32_t>(pages_read);
      plan.counts[kPagesDense] = plan.kv_indptr[p.batch];
      plan.counts[kRowsPacked] = num_packed_rows;
      plan.counts[kOverflow] = 0;
      plan.counts[kNumCounts - 1] = 0;
    });
  }

  // A plan without work, marked unusable.
  FLASHCORE_TEAM void give_up() {
    team.for_each(p.plan.num_ctas + 1, [&](int32_t cta) { p.plan.cta_indptr[cta] = 0; });
    team.for_each(p.num_tokens + 1, [&](int32_t t) { p.plan.merge_indptr[t] = 0; });
    team.for_each(kNumCounts, [&](int32_t slot) { p.plan.counts[slot] = slot == kOverflow; });
  }
};

}  // namespace flashcore
