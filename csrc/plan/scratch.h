// The planner's working memory: one block of int32, written anew by every plan.
#pragma once

#include "params.h"
#include "plan/schedule.h"

namespace flashcore {

// Packed rows that a request is in at most, and owners its path has at most: every capacity is known in advance.
constexpr int32_t kMaxLevels = 4;

struct Scratch {
  // What comes before each row; the last entries hold the whole.
  int64_t* row_cost;      // [max_rows + 1] work on the line
  int32_t* row_tiles;     // [max_rows + 1] tiles, as if the line were not cut
  int32_t* row_partials;  // [max_rows + 1] partial results, as if the line were not cut
  Line* line;
  // Where the line is cut inside a pair.
  int32_t* cut_pair;      // [num_ctas]
  int32_t* cut_unit;      // [num_ctas] first unit behind the cut
  int32_t* cut_partials;  // [num_ctas + 1] partial results that the cuts before add
  int32_t* cuts_upto;     // [num_ctas + 1] cuts at or before the start of each CTA's stretch
  // What comes before each request; the last entries hold the whole.
  int32_t* request_row;    // [batch + 1] rows of its own; those of nodes stand in front of them all
  int32_t* request_merge;  // [batch + 1] entries of merge_rows
  // Sharing, see share.h. A node is a stretch of page columns that requests have in common;
  // node = owner * kMaxLevels + level.
  int32_t* path_owner;      // [kMaxLevels, batch] owners of a request's path, -1 behind its end
  int32_t* path_end;        // [kMaxLevels, batch] first column in which the request differs from that owner
  int32_t* levels;          // [batch] nodes the request is in
  int32_t* packed_columns;  // [batch] page columns [0, packed_columns) of the request are in nodes
  int32_t* chain_owner;     // [batch, kMaxLevels] request whose page table the node's row reads
  int32_t* chain_begin;     // [batch, kMaxLevels] page columns [begin, end)
  int32_t* chain_end;
  int32_t* chain_rank;  // [batch, kMaxLevels] requests before this one in the node
  int32_t* members;     // [nodes] requests in the node
  int32_t* node_row;    // [nodes] rows before it
  int32_t* node_token;  // [nodes] entries of row_tokens before it
  int64_t size;         // entries in all
};

FLASHCORE_HD bool shares_pages(const PlanJob& p) {
  return p.share && p.split_keys == 0 && p.window_left < 0 && p.batch > 1 && tokens_per_row(p) > 1;
}

inline Scratch scratch_of(const PlanJob& p) {
  Scratch s{};
  int32_t* next = p.scratch;
  const auto take = [&](int64_t n) {
    int32_t* block = next;
    next += n;
    return block;
  };
  const int64_t rows = static_cast<int64_t>(p.plan.max_rows) + 1, ctas = static_cast<int64_t>(p.plan.num_ctas) + 1;
  s.row_cost = reinterpret_cast<int64_t*>(take(2 * rows));
  s.line = reinterpret_cast<Line*>(take(sizeof(Line) / sizeof(int32_t)));
  s.row_tiles = take(rows);
  s.row_partials = take(rows);
  s.cut_pair = take(ctas);
  s.cut_unit = take(ctas);
  s.cut_partials = take(ctas);
  s.cuts_upto = take(ctas);
  s.request_row = take(p.batch + 1);
  s.request_merge = take(p.batch + 1);
  if (shares_pages(p)) {
    const int64_t nodes = static_cast<int64_t>(p.batch) * kMaxLevels;
    s.path_owner = take(nodes);
    s.path_end = take(nodes);
    s.levels = take(p.batch);
    s.packed_columns = take(p.batch);
    s.chain_owner = take(nodes);
    s.chain_begin = take(nodes);
    s.chain_end = take(nodes);
    s.chain_rank = take(nodes);
    s.members = take(nodes);
    s.node_row = take(nodes);
    s.node_token = take(nodes);
  }
  s.size = next - p.scratch;
  return s;
}

}  // namespace flashcore
