// Where the partial results of a query stand.
#pragma once

#include "params.h"

namespace flashcore {

// The partial results of query head `item % num_qo_heads` of token `item / num_qo_heads`, numbered in the order of the
// plan.
struct PartialList {
  const AttendParams& p;
  int first_entry, end_entry, head, total;

  __device__ __forceinline__ PartialList(const AttendParams& params, int item) : p(params), total(0) {
    const int token = item / p.num_qo_heads;
    head = item % p.num_qo_heads;
    first_entry = p.plan.merge_indptr[token];
    end_entry = p.plan.merge_indptr[token + 1];
    for (int entry = first_entry; entry < end_entry; ++entry) {
      const int2 tiles = tiles_of(entry);
      total += tiles.y - tiles.x;
    }
  }

  // Row of the n-th one in the partial buffers; negative where there is none, or where its tile wrote out directly.
  __device__ __forceinline__ int row(int n) const {
    const int group = p.num_qo_heads / p.num_kv_heads;
    for (int entry = first_entry; entry < end_entry; ++entry) {
      const int2 tiles = tiles_of(entry);
      if (n < tiles.y - tiles.x) {
        const int partial = p.plan.tiles[tiles.x + n].partial;
        return partial < 0 ? -1 : partial + p.plan.merge_rows[2 * entry + 1] * group + head % group;
      }
      n -= tiles.y - tiles.x;
    }
    return -1;
  }

 private:
  __device__ __forceinline__ int2 tiles_of(int entry) const {
    const int group = p.num_qo_heads / p.num_kv_heads;
    const int pair = p.plan.merge_rows[2 * entry] * p.num_kv_heads + head / group;
    return make_int2(p.plan.tile_indptr[pair], p.plan.tile_indptr[pair + 1]);
  }
};

}  // namespace flashcore
