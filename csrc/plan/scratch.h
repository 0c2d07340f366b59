// The planner's working memory: one block of int32 that the caller keeps from plan to plan.
#pragma once

#include "params.h"
#include "plan/schedule.h"

namespace flashcore {

// Packed rows that a request is in at most; with it every capacity is known in advance.
constexpr int32_t kMaxLevels = 4;

struct Scratch {
  int64_t* row_cost;       // [max_rows + 1] work on the line before each row
  int32_t* request_row;    // [batch] first row of a request's own rows
  int32_t* request_merge;  // [batch] first entry of its tokens in merge_rows
  // Sharing. A node is a stretch of page columns that requests have in common; node = owner * kMaxLevels + level.
  int32_t* scattered;    // [batch] 1: all full columns of the request were counted, 0: the first one alone
  int32_t* chain_len;    // [batch] nodes the request's own walk found
  int32_t* levels;       // [batch] how many of them its owners confirmed
  int32_t* chain_owner;  // [batch, kMaxLevels] request whose page table the node's row reads
  int32_t* chain_begin;  // [batch, kMaxLevels] page columns [begin, end)
  int32_t* chain_end;
  int32_t* chain_rank;  // [batch, kMaxLevels] how many requests before this one are in the node
  int32_t* members;     // [nodes] requests in the node
  int32_t* node_row;    // [nodes] first of its rows
  int32_t* node_token;  // [nodes] first of its entries in row_tokens
  // Zero between plans, at the end of the block so that they stand still when the batch changes.
  int32_t* owner;  // [num_pages] batch - (lowest request that has the page in a full column), 0: none
  int32_t* count;  // [num_pages] requests that have it
  int64_t size;    // entries in all
};

FLASHCORE_HD bool shares_pages(const PlanParams& p) {
  return p.share && p.split_keys == 0 && p.window_left < 0 && p.batch > 1 && tokens_per_row(p) > 1;
}

FLASHCORE_HD Scratch scratch_of(const PlanParams& p) {
  Scratch s{};
  int32_t* next = p.scratch;
  const auto take = [&](int64_t n) {
    int32_t* block = next;
    next += n;
    return block;
  };
  s.row_cost = reinterpret_cast<int64_t*>(take(2 * (static_cast<int64_t>(p.plan.max_rows) + 1)));
  s.request_row = take(p.batch);
  s.request_merge = take(p.batch);
  if (shares_pages(p)) {
    const int64_t nodes = static_cast<int64_t>(p.batch) * kMaxLevels;
    s.scattered = take(p.batch);
    s.chain_len = take(p.batch);
    s.levels = take(p.batch);
    s.chain_owner = take(nodes);
    s.chain_begin = take(nodes);
    s.chain_end = take(nodes);
    s.chain_rank = take(nodes);
    s.members = take(nodes);
    s.node_row = take(nodes);
    s.node_token = take(nodes);
    s.count = p.scratch + p.scratch_size - p.num_pages;
    s.owner = s.count - p.num_pages;
  }
  s.size = next - p.scratch + (shares_pages(p) ? 2 * static_cast<int64_t>(p.num_pages) : 0);
  return s;
}

}  // namespace flashcore
