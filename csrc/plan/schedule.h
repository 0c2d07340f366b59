// The arithmetic of a plan, for host and device alike: what a request wants, what a key costs, where tiles are cut.
//
// Balanced tiles ("stream-K", Osama et al., arXiv 2301.03598): the work of all (row, KV head) pairs is laid on a line,
// in units of kSplitUnit keys, and the line is cut evenly over the CTAs. Where pairs are about as long as each other,
// each is cut into as many equal pieces as there are CTAs for it, or a CTA takes a number of whole ones. Every cut has
// a closed form, so that tiles are found in parallel and come out the same on every machine. Long decode steps have
// several lines, cut alike (Lines).
#pragma once

#include <algorithm>
#include <numeric>

#include "arithmetic.h"
#include "params.h"

// Device code in a CUDA source, host code in a C++ one.
#ifdef __CUDACC__
#define FLASHCORE_TEAM __device__ inline
#else
#define FLASHCORE_TEAM inline
#endif

namespace flashcore {

// Packed rows hold this many queries, where rows may hold more and little is packed: they take less code of the Hopper
// kernel, which a small step waits for, and twice the bytes from L2, which a large one does (8 query heads of one KV
// head, 64 requests over 4096 keys: 19 us with rows of 64, 34 with rows of 128; 64 over 65536, 32 query and 8 KV heads:
// 235 and 190). Much is more than so many units a CTA; less, where packed rows have a kernel of their own.
constexpr int32_t kSmallRow = 64;
constexpr int32_t kSmallRowUnits = 16, kSmallRowUnitsApart = 8;

// The largest block of keys that a kernel takes at once. With fixed splits a row begins at a multiple of it: which keys
// share a block would else hang on where the window of the row's first token begins, and so on the chunk.
constexpr int32_t kLargestBlock = 128;

// What a plan is made from, and what follows from that alone.
struct PlanJob : PlanParams {
  Divisor by_page, by_row, by_small_row, by_head;  // page_size, tokens of a row and of a small packed row, KV heads
  Divisor by_begin;                                // of what a row's first key is a multiple
  Divisor by_lines, by_line_ctas;                  // of long steps: Lines::count and ctas

  explicit PlanJob(const PlanParams& p)
      : PlanParams(p),
        by_page(p.page_size),
        by_row(p.plan.rows_per_tile / p.group),
        by_small_row(std::max(std::min(p.plan.rows_per_tile, kSmallRow) / p.group, 1)),
        by_head(p.num_kv_heads),
        by_begin(p.split_keys > 0 ? std::lcm(p.page_size, kLargestBlock) : p.page_size),
        by_lines(has_lines(p) ? std::gcd(p.plan.num_ctas, p.num_kv_heads) : 1),
        by_line_ctas(p.plan.num_ctas / by_lines.value) {}

 private:
  // Heads read together are requests read apart. Where cuts are fixed nothing is packed, and requests that share pages
  // have them from L2, if they are read together. The policy does not count: within the budget all have the same plan.
  // Page lists do (Builder::build): each head has its own, and of shared pages they name the same ones.
  static bool has_lines(const PlanParams& p) { return p.num_tokens <= p.batch && p.split_keys == 0; }
};

// Last index i of a non-decreasing indptr with indptr[i] <= value, knowing that indptr[low] <= value < indptr[high];
// entries that span nothing are passed over. A step reads three entries, which are on the way together, and leaves a
// quarter: half as many steps as halving takes.
template <class T>
FLASHCORE_HD int32_t find_segment(const T* indptr, int32_t low, int32_t high, T value) {
  while (high - low > 1) {
    const int32_t part = (high - low + 3) / 4, last = high - 1;
    const int32_t a = low + part, b = a + part < last ? a + part : last, c = b + part < last ? b + part : last;
    const bool from_a = indptr[a] <= value, from_b = indptr[b] <= value, from_c = indptr[c] <= value;
    low = from_c ? c : from_b ? b : from_a ? a : low;
    high = !from_a ? a : !from_b ? b : !from_c ? c : high;
  }
  return low;
}

struct Request {
  int32_t q_begin, q_len;
  int32_t page_begin, pages;
  int32_t kv_len;
};

FLASHCORE_HD Request request_of(const PlanJob& p, int32_t r) {
  const int32_t q_begin = p.plan.qo_indptr[r], page_begin = p.plan.kv_indptr[r];
  const int32_t pages = p.plan.kv_indptr[r + 1] - page_begin;
  // A request ends in its last page. Without a condition all loads are on the way together.
  const int32_t end = pages * p.page_size, last = end - p.page_size + p.plan.last_page_len[r];
  const int32_t kv_len = last > 0 ? (last < end ? last : end) : 0;
  return {q_begin, p.plan.qo_indptr[r + 1] - q_begin, page_begin, pages, kv_len};
}

FLASHCORE_HD int32_t tokens_per_row(const PlanJob& p) { return p.by_row.value; }

// Pages that the sparse row of a request of `pages` reads.
FLASHCORE_HD int32_t sparse_pages(const PlanJob& p, int32_t pages) {
  return p.policy == Policy::topk ? p.sparse.topk_pages(pages) : p.sparse.sink_pages + p.sparse.recent_pages;
}

// Where a request's page lists start; topk has one for each KV head.
FLASHCORE_HD int32_t list_begin(const PlanJob& p, int32_t r) {
  return p.sparse.begin + r * p.sparse.list_pages * (p.policy == Policy::topk ? p.num_kv_heads : 1);
}

// Whether page table, page lists and tokens are inside their buffers; nothing of them may be read otherwise.
FLASHCORE_HD bool batch_fits(const PlanJob& p) {
  const int32_t dense_end = p.plan.kv_indptr[p.batch];
  const int32_t lists_end = p.policy == Policy::exact ? dense_end : list_begin(p, p.batch);
  const int32_t tokens = p.plan.qo_indptr[p.batch];
  return (dense_end <= p.sparse.begin) & (lists_end <= p.plan.max_pages) & (tokens <= p.num_tokens);
}

FLASHCORE_HD bool is_sparse(const PlanJob& p, const Request& request) {
  return p.policy != Policy::exact && request.q_len == 1 && request.pages > sparse_pages(p, request.pages);
}

// One row for the keys [begin, end) of a request's own page table; begin is a multiple of page_size.
FLASHCORE_HD Row dense_row(const PlanJob& p, const Request& request, int32_t r, int32_t q_begin, int32_t q_count,
                           int32_t begin, int32_t end, int32_t flags) {
  return {.q_begin = q_begin,
          .q_count = q_count,
          .flags = flags,
          .page_begin = request.page_begin + begin / p.by_page,
          .head_stride = 0,
          .kv_len = end > begin ? end - begin : 0,
          .kv_pos = begin,
          .request = r};
}

// The row of tokens [first, first + tokens_per_row) of a request, trimmed to the keys that any of them can see.
FLASHCORE_HD Row own_row(const PlanJob& p, const Request& request, int32_t r, int32_t first) {
  const int32_t left = request.q_len - first, most = tokens_per_row(p);
  const int32_t count = left < most ? left : most;
  const int32_t first_position = request.kv_len - request.q_len + first;
  int32_t begin = 0, end = request.kv_len;
  if (p.causal && first_position + count < end) end = first_position + count;
  if (p.window_left >= 0 && first_position > p.window_left) {
    begin = (first_position - p.window_left) / p.by_begin * p.by_begin.value;
  }
  return dense_row(p, request, r, request.q_begin + first, count, begin, end, kSole);
}

// The row of a request that reads a page list: its position is that of the newest keys, so that masks hide none.
FLASHCORE_HD Row sparse_row(const PlanJob& p, const Request& request, int32_t r) {
  const int32_t pages = sparse_pages(p, request.pages);
  const int32_t kv_len = (pages - 1) * p.page_size + p.plan.last_page_len[r];
  return {.q_begin = request.q_begin,
          .q_count = 1,
          .flags = kSole,
          .page_begin = list_begin(p, r),
          .head_stride = p.policy == Policy::topk ? p.sparse.list_pages : 0,
          .kv_len = kv_len,
          .kv_pos = request.kv_len - kv_len,
          .request = r};
}

// Cost of kSplitUnit keys for a row. Up to 16 packed queries the keys' bytes are all that counts; beyond, the tensor
// cores and the softmax take their share: 128 queries on 64 keys cost about twice the bytes' time.
constexpr int32_t kBaseCost = 4;
FLASHCORE_HD int32_t unit_cost(int32_t packed) { return packed <= 16 ? kBaseCost : kBaseCost + packed / 32; }

// A packed row of so many queries at most is cut like any other, if it is the only one of its node: its partial results
// are few.
constexpr int32_t kFewPacked = 32;

// Tiles of packed rows are not cut shorter than this many units, since each writes a partial result of all its queries:
// a 16th of these, where that leaves CTAs without a tile; or else what is long.
constexpr int32_t kLeastPackedUnits = 4;
constexpr int32_t kPartQueries = 16;
constexpr int32_t kLongPackedUnits = 32;

// A CTA gets this many units at least, as long as others would otherwise get less: shorter tiles cost more to merge
// than they save.
constexpr int32_t kMinUnits = 2;

// Cut by pairs, a CTA may have this part of its share too much, but no more than so many units, and one unit in any
// case: what it saves does not grow with the shares. Where these are long, CTAs without work cost more (2 % at 64 x
// 128K, where 8 of 264 have none).
constexpr int32_t kSlackShare = 16;
constexpr int32_t kSlackUnits = 4;

// Work of one (row, KV head) pair on the line. A tile's start-up costs about as much as a unit: it stands behind the
// pair's last unit as a stretch in which no unit starts.
struct PairWork {
  int32_t units, cost, packed;

  FLASHCORE_HD int64_t total() const { return static_cast<int64_t>(units + 1) * cost; }
};

FLASHCORE_HD int32_t units_of(int32_t keys) { return ceil_div(keys, kSplitUnit); }

FLASHCORE_HD PairWork work_of(const Row& row, int32_t group) {
  const int32_t packed = row.q_count * group;
  const int32_t units = row.kv_len > 0 ? units_of(row.kv_len) : 1;  // an empty row still writes zeros
  return {units, unit_cost(packed), packed};
}

// A division that takes the short way where it can; 64-bit division is a subroutine on a GPU.
FLASHCORE_HD int64_t divide(int64_t a, int64_t b) {
  constexpr int64_t kShort = int64_t{1} << 32;
  if (a < kShort && b < kShort) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// How the KV heads of a row are laid out: on one line, one behind the other, or on `count` lines, each with in_turn of
// them and its own CTAs. Lines hold the same rows and are cut alike, so that `count` neighbouring heads of a token are
// read at about the same time. They stand side by side in memory, whose rows are then opened once and not once a head.
// Lines of even heads come before those of odd ones: heads 2 i and 2 i + 1 are read by CTAs c and c + num_ctas / 2,
// which are on one SM where it has two, and so stay together. (Four H200s, 32 query and 8 KV heads: 1 to 1.9 % faster
// from 128 MB of keys and values on, 3 % with heads of 64. scripts/bench/NOTES.md, "Heads side by side".)
struct Lines {
  int32_t count = 1, in_turn = 0, ctas = 0;

  Lines() = default;
  FLASHCORE_HD Lines(const PlanJob& p, bool abreast)
      : count(abreast ? p.by_lines.value : 1),
        in_turn(abreast ? p.num_kv_heads / p.by_lines : p.num_kv_heads),
        ctas(abreast ? p.by_line_ctas.value : p.plan.num_ctas) {}

  // Of what all lines have together, in equal parts.
  FLASHCORE_HD int32_t part(const PlanJob& p, int32_t of_all) const {
    return count == 1 ? of_all : of_all / p.by_lines;
  }
  FLASHCORE_HD int64_t part_of_work(int64_t of_all) const { return count == 1 ? of_all : divide(of_all, count); }

  // A line has each count-th KV head; this is the one whose turn it is.
  FLASHCORE_HD int32_t head(int32_t line, int32_t turn) const {
    const int32_t even = (count + 1) / 2;
    return turn * count + (line < even ? 2 * line : 2 * (line - even) + 1);
  }
  FLASHCORE_HD int32_t line_of(int32_t head, int32_t turn) const {
    const int32_t place = head - turn * count;
    return place / 2 + place % 2 * ((count + 1) / 2);
  }
};

// A CTA gets so many units at least where there are several lines: short steps wait for other things than memory, and
// may have fewer stretches than CTAs, which are to be on different SMs.
constexpr int32_t kLinesUnits = 8;

// A line in `shares` stretches, the first `longer` of them of length + 1: a unit belongs to the CTA in whose stretch it
// starts. A unit whose predecessor in the pair belongs to another CTA starts a tile: there the line is cut.
//
// Or, where no CTA then has much more than its share: `pieces` equal pieces of every pair, a CTA each, or `whole` pairs
// a CTA. A CTA has one tile then, or tiles that need no merge. Memory stays busy as long as a third of the CTAs are, so
// that a share that is a little too large costs less than the start-up and the partial results of a second tile.
struct Line {
  int64_t length;
  int32_t longer, shares;
  int32_t pieces = 0, whole = 0;  // both 0: cut evenly

  FLASHCORE_HD Line(int64_t work, int32_t num_ctas, bool balanced) : shares(num_ctas) {
    const int64_t enough = divide(work, kMinUnits * kBaseCost);
    if (balanced && enough < shares) shares = enough > 1 ? static_cast<int32_t>(enough) : 1;
    length = divide(work, shares);
    longer = static_cast<int32_t>(work - length * shares);
  }
  FLASHCORE_HD void cut_by_pairs(int32_t pairs, int64_t longest) {
    const int64_t part = length / kSlackShare, limit = kSlackUnits * kBaseCost;
    const int64_t most = length + (part < limit ? part : limit) + kBaseCost;
    if (pairs <= shares) {
      // No more than the longest pair needs for its pieces to be as short as that: a merge likes to have few, and 32
      // above all (33 pieces of 128 units are 4 units long, as 32 are).
      const int32_t units = static_cast<int32_t>(longest / kBaseCost) - 1, n = shares / pairs;
      if (longest <= most * n) pieces = units > n ? ceil_div(units, ceil_div(units, n)) : n;
    } else {
      const int32_t n = ceil_div(pairs, shares);
      if (longest * n <= most) whole = n;
    }
  }

  FLASHCORE_HD int64_t begin(int32_t cta) const { return cta * length + (cta < longer ? cta : longer); }
  // The CTA of the line that the cuts up to and in a pair are counted at: the one with begin(cta) <= position <
  // begin(cta + 1), or the first one of the pair.
  FLASHCORE_HD int32_t cta_of(int32_t pair, int64_t position) const {
    if (pieces + whole > 0) return pair * pieces;
    const int64_t even = longer * (length + 1);
    if (position < even) return static_cast<int32_t>(divide(position, length + 1));
    return longer + static_cast<int32_t>(divide(position - even, length));
  }
};

}  // namespace flashcore
