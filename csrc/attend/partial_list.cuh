// Where the partial results of a query stand.
#pragma once

#include "params.h"

namespace flashcore {

// The partial results of query head `item % num_qo_heads` of token `item / num_qo_heads`, numbered in the order of the
// plan. Its loops are not unrolled: the merge waits for its code (merge.cu).
struct PartialList {
  const Plan& plan;
  int num_kv_heads, group;
  int kv_head, head_in_group;
  int first_entry, end_entry, total;

  __device__ __forceinline__ PartialList(const AttendParams& p, int item)
      : plan(p.plan), num_kv_heads(p.num_kv_heads), total(0) {
    const unsigned heads = p.num_qo_heads, token = static_cast<unsigned>(item) / heads, head = item - token * heads;
    group = heads / static_cast<unsigned>(num_kv_heads);
    kv_head = head / static_cast<unsigned>(group);
    head_in_group = head - kv_head * group;
    first_entry = plan.merge_indptr[token];
    end_entry = plan.merge_indptr[token + 1];
#pragma unroll 1
    for (int entry = first_entry; entry < end_entry; ++entry) {
      const int2 tiles = tiles_of(row_and_token(entry));
      total += tiles.y - tiles.x;
    }
  }

  // Row of the n-th one in the partial buffers; negative where there is none, or where its tile wrote out directly.
  __device__ __forceinline__ int row(int n) const {
#pragma unroll 1
    for (int entry = first_entry; entry < end_entry; ++entry) {
      const int2 at = row_and_token(entry), tiles = tiles_of(at);
      if (n < tiles.y - tiles.x) {
        const int partial = plan.tiles[tiles.x + n].partial;
        return partial < 0 ? -1 : partial + at.y * group + head_in_group;
      }
      n -= tiles.y - tiles.x;
    }
    return -1;
  }

 private:
  __device__ __forceinline__ int2 row_and_token(int entry) const {
    return reinterpret_cast<const int2*>(plan.merge_rows)[entry];
  }
  __device__ __forceinline__ int2 tiles_of(int2 at) const {
    return reinterpret_cast<const int2*>(plan.pair_tiles)[at.x * num_kv_heads + kv_head];
  }
};

}  // namespace flashcore
