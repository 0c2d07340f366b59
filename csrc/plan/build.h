// From page tables (and the walks of share.h) to rows, cuts and CTA ranges: everything in a plan that needs a sum over
// what comes before. It is left in Sums; write.h makes the plan of that, each item by itself.
//
// Team runs it: one CPU thread, or the threads of one CTA. It offers
//   scan(n, value, f)    f(i, sum of value(j) for j < i) for every i, finished when it returns the whole sum. f(i)
//                        follows value(i) in the same thread, so that the one may leave something for the other in a
//                        captured variable
// so that both produce the same plan from the same source. An item that adds nothing stands behind the others where the
// whole sum is to be left as well.
#pragma once

#include "plan/share.h"

namespace flashcore {

// What a request adds to the plan: the nodes it owns, and its own rows.
struct RequestSum {
  int32_t node_rows, node_tokens, own_rows, merge_entries;
  int32_t node_units, own_units;  // of one KV head
  int32_t saved_units;            // that requests would read for themselves
  int32_t unique_units;           // of nodes, each once

  FLASHCORE_HD RequestSum operator+(const RequestSum& other) const {
    return {node_rows + other.node_rows,         node_tokens + other.node_tokens,  own_rows + other.own_rows,
            merge_entries + other.merge_entries, node_units + other.node_units,    own_units + other.own_units,
            saved_units + other.saved_units,     unique_units + other.unique_units};
  }
};

// Whether packed rows save enough, all together. What they save is mostly read from L2, where it is after the first
// request has read it; what they cost does not depend on their keys, but on the queries of a row, beside what all do.
constexpr int32_t kPackQueries = 48;
FLASHCORE_HD bool packing_pays(const PlanJob& p, const RequestSum& sum) {
  const int64_t saved = int64_t{sum.saved_units} * kSplitUnit * p.num_kv_heads;
  const int64_t queries = int64_t{sum.node_tokens} * p.group + int64_t{kPackQueries} * sum.node_rows;  // of all rows
  return saved * sum.node_rows >= p.pack_keys * queries;
}

// How many tiles a pair of a packed row is cut into.
//
// So many that none takes longer than a CTA's share of all work, or is long, as far as there is a CTA for each; but
// none shorter than a 16th of its queries in units, since each writes a partial result of all of them.
//
// Where one Hopper kernel takes all, long tiles may be more than the CTAs. Half of these begin with the short tiles,
// and where these come to an end while the others are in their second packed tile, half the machine would have nothing
// left to do. That is so where the requests' own keys are between 3/8 and 7/4 of the packed rows'. (An H200, 32 query
// and 8 KV heads, 512 requests over 4 prefixes of 8192 keys with 128, 256 and 384 keys of their own: 247 to 223, 309 to
// 265 and 310 to 304 us; with fewer or more own keys up to 25 % slower. scripts/bench/NOTES.md has the tables.)
struct PackedPieces {
  int32_t shortest = kLongPackedUnits;
  int32_t most = 0, most_long = 0;

  PackedPieces() = default;
  FLASHCORE_HD PackedPieces(const PlanJob& p, const RequestSum& sum) {
    const int32_t ctas = p.plan.num_ctas, pairs = sum.node_rows * p.num_kv_heads;
    const int32_t queries = sum.node_tokens * p.group / sum.node_rows;  // of a row, in the mean
    const int32_t cost = unit_cost(queries);
    const int64_t all = int64_t{sum.node_units} * cost + int64_t{sum.own_units} * kBaseCost;
    const int64_t fair = divide(divide(all * p.num_kv_heads, ctas), cost);
    const int32_t least = queries / kPartQueries > kLeastPackedUnits ? queries / kPartQueries : kLeastPackedUnits;
    if (fair < kLongPackedUnits) shortest = fair > least ? static_cast<int32_t>(fair) : least;
    const int64_t own = 8 * int64_t{sum.own_units}, packed = sum.node_units;  // compared in eighths of the packed
    const bool finer = !packs_apart(p.batch, p.num_kv_heads, p.group) && own >= 3 * packed && own < 14 * packed;
    const int32_t more = !finer ? 0 : own < 7 * packed ? ctas / 2 : ctas;
    most = ctas / pairs;
    most_long = (ctas + more) / pairs;
  }
  FLASHCORE_HD int32_t of(int32_t units) const {
    const int32_t enough = ceil_div(units, shortest), enough_long = ceil_div(units, kLongPackedUnits);
    const int32_t pieces = most < enough ? most : enough, longer = most_long < enough_long ? most_long : enough_long;
    return pieces > longer ? pieces : longer;
  }
};

// Of the SMs, in 1024ths, what the packed rows of a plan are worth to the Hopper kernels. A unit of theirs takes an SM
// some 1 us, whatever its queries; one that a request has to itself a third of that, where as many SMs ask as memory
// needs. Those are half, so that fewer than kLeastShare make nothing faster, and more than kMostShare leave too few.
// Packed rows most of whose keys no other row reads wait for memory, too; SMs that are done with the other rows help.
// (An H200, 512 requests over 4 prefixes of 8192 keys with 256 of their own: 253, 240 and 206 us with 400, 600, 720;
// 128 over 4 of 32768: 183, 196, 206; 512 over one of 2048: 161, 154, 179, and 147 with 500.)
constexpr int32_t kLeastShare = 540, kMostShare = 720, kShareOfAlone = 400;
FLASHCORE_HD int32_t packed_share(const RequestSum& sum) {
  if (4 * int64_t{sum.unique_units} > 3 * int64_t{sum.node_units}) return kShareOfAlone;
  const int64_t packed = 3 * int64_t{sum.node_units};
  const auto share = static_cast<int32_t>(divide(kWholeShare * packed, packed + sum.own_units));
  return share < kLeastShare ? kLeastShare : share < kMostShare ? share : kMostShare;
}

// What a cut adds to the plan.
struct CutSum {
  int32_t cuts, partials;

  FLASHCORE_HD CutSum operator+(const CutSum& other) const { return {cuts + other.cuts, partials + other.partials}; }
};

// The members of a node stand in rows as even as they come, the longer ones first, in the order of their ranks.
struct NodeRows {
  int32_t rows, length, longer;

  FLASHCORE_HD NodeRows(const PlanJob& p, bool small, int32_t members)
      : rows(small ? ceil_div(members, p.by_small_row) : ceil_div(members, p.by_row)) {
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

// What a row adds to the plan, as if no line were cut.
struct RowSum {
  int64_t cost;
  int32_t pages, tiles, partials;
  int32_t longest;  // work of the longest pair so far

  FLASHCORE_HD RowSum operator+(const RowSum& other) const {
    return {cost + other.cost, pages + other.pages, tiles + other.tiles, partials + other.partials,
            longest > other.longest ? longest : other.longest};
  }
};

// How the pairs of a row are cut without regard to the lines: every split_units units.
//
// In deterministic mode: requests of one token (others are short). Else: packed rows, so that those of a node, which
// read the same keys, are cut alike and can read them together (kAlike).
struct FixedCuts {
  int32_t split_units, tiles;

  FLASHCORE_HD FixedCuts(const PlanJob& p, const Row& row, int32_t units, const PackedPieces& packed)
      : split_units(units), tiles(1) {
    if (p.split_keys > 0) {
      if (p.plan.qo_indptr[row.request + 1] - p.plan.qo_indptr[row.request] != 1) return;
      split_units = p.split_keys / kSplitUnit;
    } else if (row.flags & kAlike) {
      const int32_t pieces = packed.of(units);
      if (pieces > 1) split_units = ceil_div(units, pieces);
    }
    if (split_units < units) tiles = ceil_div(units, split_units);
  }
  // Those of row i, once rows are placed.
  FLASHCORE_HD FixedCuts(const PlanJob& p, const Sums& s, int32_t i)
      : split_units(s.row_split[i]), tiles((s.row_tiles[i + 1] - s.row_tiles[i]) / p.by_head) {}

  // Whether all tiles of the row leave partial results, even if its line cuts none of its pairs.
  FLASHCORE_HD bool merged(const Row& row) const { return tiles > 1 || !(row.flags & kSole); }
};

// The rows a request is in.
struct RequestRows {
  Request request;
  int32_t levels = 0;
  int32_t packed_end = 0;  // first key that is in no packed row

  FLASHCORE_HD RequestRows(const PlanJob& p, const Found& found, bool share, int32_t r) : request(request_of(p, r)) {
    if (!share) return;
    levels = found.levels[r];
    packed_end = found.packed_columns[r] * p.page_size;
  }
  FLASHCORE_HD int32_t own_rows(const PlanJob& p) const {
    if (request.q_len == 1) return packed_end == 0 || packed_end < request.kv_len;
    return ceil_div(request.q_len, p.by_row);
  }
  FLASHCORE_HD int32_t own_units() const { return units_of(request.kv_len - packed_end); }
  FLASHCORE_HD int32_t merge_entries(const PlanJob& p) const {
    return request.q_len == 1 ? levels + own_rows(p) : request.q_len;
  }
};

// What there is of everything; nothing of a batch that does not fit.
struct Totals {
  int32_t rows = 0, packed_rows = 0, uncut = 0, cuts = 0, partials = 0, pages = 0;
  Lines lines;
  PackedPieces packed_pieces;
  int32_t packed_share = 0;  // kPackedShare
  bool share = false;        // whether there are packed rows
  bool small_rows = false;   // and whether they are small ones
  bool fits = false;

  FLASHCORE_HD int32_t tiles() const { return uncut + cuts; }
  // Whether every pair is one tile, if its line does not cut it.
  FLASHCORE_HD bool one_tile_each(const PlanJob& p) const { return p.split_keys == 0 && packed_rows == 0; }
};

constexpr int32_t kTogether = 32;  // threads that take a branch together

template <class Team>
class Builder {
  const PlanJob& p;
  const Found& found;
  const Sums& s;
  Team& team;
  Totals total;

 public:
  FLASHCORE_TEAM Builder(const PlanJob& job, const Found& found, const Sums& sums, Team& team)
      : p(job), found(found), s(sums), team(team) {}

  FLASHCORE_TEAM Totals build() {
    const Plan& plan = p.plan;
    const bool fits = batch_fits(p);
    total.share = shares_pages(p);
    total.small_rows = p.by_small_row.value < p.by_row.value;
    RequestSum whole = place_requests();
    const bool pays = packing_pays(p, whole);
    const int32_t little = packs_apart(p.batch, p.num_kv_heads, p.group) ? kSmallRowUnitsApart : kSmallRowUnits;
    const bool much = total.small_rows && int64_t{whole.node_units} * p.num_kv_heads > little * plan.num_ctas;
    if (total.share && (!pays || much)) {
      total.share = pays;
      total.small_rows = false;
      whole = place_requests();
    }
    total.packed_rows = whole.node_rows;
    if (whole.node_rows > 0) {
      total.packed_pieces = PackedPieces(p, whole);
      total.packed_share = packed_share(whole);
    }
    total.rows = whole.node_rows + whole.own_rows;
    if (!fits || total.rows > s.max_rows || whole.node_tokens > plan.max_row_tokens ||
        whole.merge_entries > plan.max_merge) {
      return {};
    }
    const RowSum sum = place_rows();
    total.uncut = sum.tiles;
    total.pages = sum.pages;
    const int64_t enough = int64_t{kLinesUnits} * kBaseCost * plan.num_ctas;
    const bool lists = p.window_left < 0 && sum.pages < plan.kv_indptr[p.batch];  // some row does not read all
    total.lines = Lines(p, total.packed_rows == 0 && !lists && sum.cost >= enough);
    const CutSum cuts = cut_lines(sum);
    total.cuts = cuts.cuts;
    total.partials = sum.partials + cuts.partials;
    if (total.tiles() > plan.max_tiles || total.partials > plan.max_partials) return {};
    total.fits = true;
    return total;
  }

 private:
  FLASHCORE_TEAM RequestSum place_requests() {
    const bool share = total.share, small = total.small_rows;
    RequestSum nodes[kMaxLevels] = {};
    return team.template scan<RequestSum>(
        p.batch + 1,
        [&](int32_t r) {
          if (r == p.batch) return RequestSum{};
          Link links[kMaxLevels];  // read before anything waits for what is read
          for (int32_t level = 0; share && level < kMaxLevels; ++level) {
            links[level] = found.chain[r * kMaxLevels + level];
          }
          const RequestRows rows(p, found, share, r);
          RequestSum sum = {0, 0, rows.own_rows(p), rows.merge_entries(p), 0, rows.own_units(), 0, 0};
          for (int32_t level = 0; share && level < kMaxLevels; ++level) {
            const int32_t members = links[level].members, node_rows = NodeRows(p, small, members).rows;
            const int32_t columns = links[level].end - (level > 0 ? links[level - 1].end : 0);
            const int32_t units = members > 0 ? units_of(columns * p.page_size) : 0;
            nodes[level] = {node_rows, members, 0, 0, node_rows * units, 0, (members - 1) * units, units};
            sum = sum + nodes[level];
          }
          return sum;
        },
        [&](int32_t r, RequestSum before) {
          s.request_row[r] = before.own_rows;
          s.request_merge[r] = before.merge_entries;
          for (int32_t level = 0; share && level < kMaxLevels && r < p.batch; ++level) {
            s.node_row[r * kMaxLevels + level] = before.node_rows;
            s.node_token[r * kMaxLevels + level] = before.node_tokens;
            before = before + nodes[level];
          }
        });
  }

  // The rows of nodes, and those of requests behind them. Items that are no row stand between, so that no warp has
  // both.
  FLASHCORE_TEAM RowSum place_rows() {
    const int32_t gap = (kTogether - total.packed_rows % kTogether) % kTogether;
    const auto row_at = [&](int32_t item) {
      if (item < total.packed_rows) return item;
      return item < total.packed_rows + gap ? -1 : item - gap;
    };
    return team.template scan<RowSum>(
        total.rows + gap + 1,
        [&](int32_t item) {
          const int32_t i = row_at(item);
          if (i < 0 || i == total.rows) return RowSum{};
          const Row row = row_of(i);
          s.rows[i] = row;
          const PairWork work = work_of(row, p.group);
          const FixedCuts cuts(p, row, work.units, total.packed_pieces);
          s.row_split[i] = cuts.split_units;
          const int32_t tiles = cuts.tiles * p.num_kv_heads;
          return RowSum{work.total() * p.num_kv_heads, ceil_div(row.kv_len, p.by_page), tiles,
                        cuts.merged(row) ? tiles * work.packed : 0, static_cast<int32_t>(work.total())};
        },
        [&](int32_t item, const RowSum& before) {
          const int32_t i = row_at(item);
          if (i < 0) return;
          s.row_cost[i] = before.cost;
          s.row_tiles[i] = before.tiles;
          s.row_partials[i] = before.partials;
        });
  }

  FLASHCORE_TEAM Row row_of(int32_t i) const {
    if (i < total.packed_rows) {
      const int32_t node = find_segment(s.node_row, 0, p.batch * kMaxLevels, i);
      return node_row(node, i - s.node_row[node]);
    }
    const int32_t own = i - total.packed_rows, r = find_segment(s.request_row, 0, p.batch, own);
    return request_row(r, own - s.request_row[r]);
  }

  FLASHCORE_TEAM Row node_row(int32_t node, int32_t i) const {
    const int32_t owner = node / kMaxLevels;
    const int32_t begin = node % kMaxLevels > 0 ? found.chain[node - 1].end : 0;
    const int32_t members = found.chain[node].members;
    const NodeRows rows(p, total.small_rows, members);
    const bool alike = rows.rows > 1 || members * p.group > kFewPacked;
    return dense_row(p, request_of(p, owner), owner, s.node_token[node] + rows.first(i),
                     rows.first(i + 1) - rows.first(i), begin * p.page_size, found.chain[node].end * p.page_size,
                     alike ? kPacked | kAlike | AlikeRows{i, rows.rows}.flags() : kPacked);
  }

  FLASHCORE_TEAM Row request_row(int32_t r, int32_t i) const {
    const RequestRows rows(p, found, total.share, r);
    const Request& request = rows.request;
    if (is_sparse(p, request)) return sparse_row(p, request, r);
    if (rows.levels > 0) return dense_row(p, request, r, request.q_begin, 1, rows.packed_end, request.kv_len, 0);
    return own_row(p, request, r, i * tokens_per_row(p));
  }

  // The first tile that a CTA's stretch of its line holds the start of, and the cut there, if there is one.
  struct Start {
    int32_t tile = 0;  // as if no line were cut
    int32_t pair = 0, unit = 0;
    CutSum cut = {0, 0};  // whether there is a new cut, and the partial results it adds
  };

  FLASHCORE_TEAM Start start_of(const Line& line, int32_t cta) const {
    const Lines& lines = total.lines;
    if (cta == p.plan.num_ctas) return {.tile = total.uncut};
    const int32_t number = lines.count == 1 ? 0 : cta / p.by_line_ctas, of_line = cta - number * lines.ctas;
    const int32_t tiles = lines.part(p, total.uncut), first_tile = number * tiles;
    if (of_line >= line.shares || total.rows == 0) return {.tile = first_tile + tiles};
    if (line.whole > 0) {
      const int32_t tile = of_line * line.whole;
      return {.tile = first_tile + (tile < tiles ? tile : tiles)};
    }
    if (line.pieces > 0) return start_of_piece(line, number, first_tile, of_line);
    const int64_t begin = line.begin(of_line);
    const int32_t i = find_segment(s.row_cost, 0, total.rows, begin * lines.count);
    const Row& row = s.rows[i];
    const PairWork work = work_of(row, p.group);
    const FixedCuts fixed(p, s, i);
    const int64_t in_row = lines.part_of_work(begin * lines.count - s.row_cost[i]);
    const int32_t turn = static_cast<int32_t>(divide(in_row, work.total()));
    const int32_t in_pair = static_cast<int32_t>(in_row - turn * work.total());
    const int32_t unit = ceil_div(in_pair, work.cost);  // the first one at or after the start of the stretch
    const int32_t tile = first_tile + lines.part(p, s.row_tiles[i]) + turn * fixed.tiles;
    if (p.split_keys > 0 || row.flags & kAlike) {
      const int32_t k = ceil_div(unit, fixed.split_units);
      return {.tile = tile + (k < fixed.tiles ? k : fixed.tiles)};
    }
    if (unit >= work.units) return {.tile = tile + 1};
    // A CTA whose stretch holds no unit of the pair starts where the next one does.
    const int64_t before = of_line > 0 ? begin - line.begin(of_line - 1) : 0;
    const bool cuts = unit > 0 && int64_t{unit - 1} * work.cost >= in_pair - before;
    const bool first = in_pair <= before && !fixed.merged(row);  // then the tile before the cut is merged, too
    return {.tile = tile,
            .pair = i * p.num_kv_heads + lines.head(number, turn),
            .unit = unit,
            .cut = {cuts, cuts ? (first ? 2 : 1) * work.packed : 0}};
  }

  FLASHCORE_TEAM Start start_of_piece(const Line& line, int32_t number, int32_t first_tile, int32_t of_line) const {
    const Lines& lines = total.lines;
    const int32_t pair = of_line / line.pieces, piece = of_line - pair * line.pieces;
    const int32_t i = pair * lines.count / p.by_head, turn = pair - i * lines.in_turn;
    if (i >= total.rows) return {.tile = first_tile + total.rows * lines.in_turn};
    const PairWork work = work_of(s.rows[i], p.group);
    const int32_t unit = piece * work.units / line.pieces;
    const int32_t unit_before = piece > 0 ? (piece - 1) * work.units / line.pieces : 0;
    const bool cuts = unit > unit_before;  // a pair of fewer units leaves CTAs without
    return {.tile = first_tile + pair,
            .pair = i * p.num_kv_heads + lines.head(number, turn),
            .unit = unit,
            .cut = {cuts, cuts ? (unit_before == 0 ? 2 : 1) * work.packed : 0}};
  }

  FLASHCORE_TEAM CutSum cut_lines(const RowSum& sum) {
    const Lines& lines = total.lines;
    Line line(lines.part_of_work(sum.cost), lines.ctas, p.split_keys == 0);
    if (total.one_tile_each(p) && total.rows > 0) line.cut_by_pairs(total.rows * lines.in_turn, sum.longest);
    Start start;
    return team.template scan<CutSum>(
        p.plan.num_ctas + 1,
        [&](int32_t cta) {
          start = start_of(line, cta);
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
          s.cta_tile[cta] = start.tile + upto;
          if (cta == 0) *s.line = line;
          if (cta == p.plan.num_ctas) s.cut_partials[upto] = before.partials;  // cuts nothing
        });
  }
};

}  // namespace flashcore
