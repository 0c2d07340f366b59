// What the CPU's and the GPU's page selection agree on, to the last bit.
//
// Sums of a score: each block of 8 channels in order, then the blocks pairwise, from the far half to the near one. No
// multiply-add is fused, since not every machine has one.
#pragma once

#include <bit>

#include "params.h"

#ifdef __CUDACC__
#define FLASHCORE_BOTH __host__ __device__ inline
#else
#define FLASHCORE_BOTH inline
#endif

namespace flashcore {

constexpr int kBlock = 8;  // channels that one lane sums up: 16 bytes of 16-bit elements

// Unsigned integers in the order of floats.
FLASHCORE_BOTH uint32_t sort_key(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The page columns of a request: sinks | [middle_begin, middle_end) to choose from | recent.
struct Choice {
  int32_t pages;  // of the request
  int32_t middle_begin, middle_end;
  int32_t count;         // pages to choose
  const int32_t* table;  // page ids
  int32_t* list;         // [budget_pages] of the KV head

  FLASHCORE_BOTH Choice(const SelectParams& p, int32_t r, int32_t kv_head) {
    const int32_t begin = p.plan.kv_indptr[r];
    pages = p.plan.kv_indptr[r + 1] - begin;
    middle_begin = p.sink_pages;
    const int32_t recent_begin = pages - p.recent_pages;
    middle_end = recent_begin < p.max_columns ? recent_begin : p.max_columns;
    count = p.budget_pages - p.sink_pages - p.recent_pages;
    table = p.plan.kv_indices + begin;
    list = p.plan.kv_indices + p.sparse_begin + (int64_t{r} * p.num_kv_heads + kv_head) * p.budget_pages;
  }
};

// Requests within the budget have dense rows and no list.
FLASHCORE_BOTH bool selects(const SelectParams& p, int32_t r) {
  const int32_t pages = p.plan.kv_indptr[r + 1] - p.plan.kv_indptr[r];
  return p.plan.qo_indptr[r + 1] - p.plan.qo_indptr[r] == 1 && pages > p.budget_pages;
}

}  // namespace flashcore
