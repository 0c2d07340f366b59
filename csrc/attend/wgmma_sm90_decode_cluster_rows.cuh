// Decode on Hopper, a cluster of CTAs a KV head: who reads which keys, and who merges what.
#pragma once

#include "attend/wgmma_sm90_decode_pieces.cuh"

namespace flashcore::decode90 {

constexpr int kClusterHeads = 8;   // KV heads
constexpr int kClusterCtas = 8;    // of a KV head
constexpr int kClusterWarps = 8;   // of a CTA
constexpr int kClusterBatch = 16;  // requests at most: fewer than 32 rows, one a lane
constexpr int kKept = 1 << 30;     // partial results from here on are kept: query i of the line at kKept + i
constexpr int kStartPieces = 8;    // what going on to another row costs, in pieces of 16 keys

// Pieces that a CTA of the cluster takes of a line of `length`. What is cut alike gives the same bits.
__device__ __forceinline__ int share_of_cta(int length) { return max(ceil_div(length, kClusterCtas), kClusterWarps); }

// The rows of a plan for one KV head, one a lane, on a line in pieces of 16 keys that is cut evenly over the cluster's
// CTAs: the rows one behind the other where every CTA has parts of one row only, as with one request or 2, 4 and 8 of
// one length, else with what going on to another row costs between them. A warp makes it for itself, of one load;
// PieceLoader reads it as it reads TileWindow.
class HeadRows {
 public:
  __device__ __forceinline__ HeadRows(const FewParams& params, int head, int rank, int lane)
      : plan_(params.attend.plan), head_(head), row_(lane < plan_.max_rows ? load_kept(plan_.rows + lane) : Row{}) {
    const int num_rows = load_kept(plan_.counts + kNumRows);
    const bool exists = lane < num_rows;
    pieces_ = exists ? max(1, ceil_div(row_.kv_len, kWarpKeys)) : 0;
    const int queries = exists ? row_.q_count * params.group : 0;
    int end = pieces_, last_query = queries;
    const int most_rows = 2 * params.attend.batch - 1;  // one of each request, and fewer packed ones
#pragma unroll 1
    for (int step = 1; step < most_rows; step *= 2) {
      const int before = __shfl_up_sync(~0u, end, step), queries_before = __shfl_up_sync(~0u, last_query, step);
      if (lane >= step) {
        end += before;
        last_query += queries_before;
      }
    }
    const int length = __shfl_sync(~0u, end, most_rows - 1);
    share_ = share_of_cta(length);
    const int ctas = __float2int_rn(__fdividef(static_cast<float>(end), static_cast<float>(share_)));
    if (!__all_sync(~0u, ctas * share_ == end || end == length)) {
      share_ = share_of_cta(length + (num_rows - 1) * kStartPieces);
      end += min(lane, num_rows - 1) * kStartPieces;
    }
    first_piece_ = end - pieces_;
    first_query_ = last_query - queries;
    num_queries_ = __shfl_sync(~0u, last_query, most_rows - 1);
    piece_begin_ = min(max(rank * share_ - first_piece_, 0), pieces_);
    piece_end_ = min(max((rank + 1) * share_ - first_piece_, 0), pieces_);
  }

  // Rows that this CTA has pieces of.
  __device__ __forceinline__ TileRange range() const {
    const unsigned mine = __ballot_sync(~0u, piece_end_ > piece_begin_);
    return mine == 0 ? TileRange{0, 0} : TileRange{__ffs(mine) - 1, 32 - __clz(mine)};
  }

  __device__ __forceinline__ static bool holds(int) { return true; }
  __device__ __forceinline__ static void load(int, int) {}
  __device__ __forceinline__ int pair(int) const { return head_; }
  __device__ __forceinline__ int kv_begin(int i) const { return __shfl_sync(~0u, piece_begin_ * kWarpKeys, i); }
  __device__ __forceinline__ int kv_end(int i) const {
    return __shfl_sync(~0u, min(piece_end_ * kWarpKeys, row_.kv_len), i);
  }
  __device__ __forceinline__ int page_begin(int i) const {
    return __shfl_sync(~0u, row_.page_begin + head_ * row_.head_stride, i);
  }
  __device__ __forceinline__ PageWindow pages(int i, int page_shift, int lists_begin) const {
    return PageWindow::of(plan_, page_begin(i), kv_begin(i), kv_end(i), page_shift, lists_begin);
  }
  // This CTA's part of row i; its partial results are those of merge items, or of queries of the line.
  __device__ __forceinline__ Tile tile(int i, int group) const {
    const auto of = [&](int field) { return __shfl_sync(~0u, field, i); };
    const bool sole = row_.flags & kSole, whole = piece_begin_ == 0 && piece_end_ == pieces_;
    const int partial = !sole ? kKept + first_query_ : whole ? -1 : row_.q_begin * group;
    return {.pair = head_,
            .kv_begin = kv_begin(i),
            .kv_end = kv_end(i),
            .partial = of(partial),
            .page_begin = page_begin(i),
            .q_begin = of(row_.flags & kPacked ? ~row_.q_begin : row_.q_begin),
            .q_count = of(row_.q_count),
            .kv_pos = of(row_.kv_pos)};
  }

  __device__ __forceinline__ int num_queries() const { return num_queries_; }
  __device__ __forceinline__ int first_query(int i) const { return __shfl_sync(~0u, first_query_, i); }
  __device__ __forceinline__ bool is_sole(int i) const { return __shfl_sync(~0u, row_.flags, i) & kSole; }
  // Whether CTA `rank` has pieces of row i; both may differ from lane to lane.
  __device__ __forceinline__ bool is_in(int i, int rank) const {
    const int begin = __shfl_sync(~0u, first_piece_, i), pieces = __shfl_sync(~0u, pieces_, i);
    return begin < (rank + 1) * share_ && begin + pieces > rank * share_;
  }

 private:
  const Plan& plan_;
  const int head_;
  const Row row_;
  int pieces_, first_piece_, first_query_;  // of this lane's row, and where they stand on the line
  int piece_begin_, piece_end_;             // of this lane's row, those that this CTA takes
  int share_, num_queries_;
};

// A query head of a token, which one warp of the cluster merges: number token * group + head_in_group, in CTA number
// % 8.
struct MergeItem {
  int token, head_in_group;
  int begin = 0, rows = 0;  // entries of merge_rows: the rows that the token is in
  int2 entry{0, 0};         // lane i: the i-th of them, and the token's index in it

  __device__ __forceinline__ MergeItem(const FewParams& params, int n)
      : token(n / params.by_group), head_in_group(n % params.by_group) {
    if (token >= params.attend.num_tokens) return;
    const int32_t* indptr = params.attend.plan.merge_indptr + token;
    begin = load_kept(indptr);
    rows = load_kept(indptr + 1) - begin;
  }
  __device__ __forceinline__ void load_entries(const Plan& plan, int lane) {
    if (lane < rows) entry = reinterpret_cast<const int2*>(plan.merge_rows)[begin + lane];
  }
};

}  // namespace flashcore::decode90
