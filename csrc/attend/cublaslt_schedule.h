// How the cublaslt variant cuts a batch into matmuls: sizes known to the host, no CUDA.
//
// Every (request, KV head) is a pair, padded at the front to the longest request, so that the last query of every pair
// stands before its last key: which keys a block of queries can see is then the same for all pairs. A unit is as many
// pairs as the scratch for scores holds. As many units as there are lanes (streams, each with its own scratch) go side
// by side, so that the matmuls of one overlap the softmax of another.
//
//   for unit: gather Q, K, V
//     for span of queries: { for block of the span, for chunk of keys: S = Q K^T, softmax, O += P V }; out = O / l
#pragma once

#include <algorithm>
#include <cstdint>

#include "arithmetic.h"
#include "params.h"

namespace flashcore {

struct CublasLtShape {
  int32_t batch, max_qo_len, max_kv_len;  // of the longest requests
  int32_t num_kv_heads, group, head_dim;
  DType dtype;
  int32_t causal;
  int32_t fp32_scores;  // what S is kept in; 0: fp16, and then so are Q and K
};

struct CublasLtSchedule {
  static constexpr int kGrain = 64;  // every length is a multiple of it: few matmul shapes, aligned rows
  static constexpr int kMaxLanes = 2;
  static constexpr int kMaxChunk = 4096;  // keys whose scores a warp of the softmax holds
  static constexpr int kMaxBlock = 1024;  // query tokens
  // Causal: an eighth of the queries, so that little of what the mask hides is computed.
  static constexpr int kCausalBlocks = 8, kMaxCausalBlock = 512;
  static constexpr int kSpan = 4;  // blocks whose output is written at once
  // Scores of a lane. On an H200 chunks that stay in its L2 of 50 MB (16 MB on each of two lanes) lose to large ones,
  // because they are three launches for each 19 us: B16 H16 S2048 D64 takes 2.7 ms with 16 MB, 2.5 with 128, 2.4 with
  // 256.
  static constexpr int64_t kScoreBytes = 256 << 20;

  int32_t qo_len, kv_len;                 // of a pair, padded
  int32_t offset;                         // causal: the query at padded index i sees keys up to padded index offset + i
  int32_t span, block, chunk;             // query tokens, query tokens, keys
  int32_t pairs, unit, num_units, lanes;  // all pairs, pairs of a unit
  int64_t q, k, v, scores, o, max, sum, lane_bytes;  // offsets in the scratch of a lane, in bytes

  explicit CublasLtSchedule(const CublasLtShape& shape) {
    const int queries = std::max(shape.max_qo_len, 1);
    if (shape.causal) {
      block = kGrain;
      while (block < kMaxCausalBlock && kCausalBlocks * block < queries) block *= 2;
    } else {
      block = round_up(ceil_div(queries, ceil_div(queries, kMaxBlock)), kGrain);
    }
    qo_len = round_up(queries, block);
    // A whole number of blocks before the first query: chunks then end where the causal mask ends.
    const int prefix = round_up(std::max(shape.max_kv_len - shape.max_qo_len, 0), block);
    kv_len = shape.causal ? prefix + qo_len : round_up(std::max(shape.max_kv_len, 1), kGrain);
    offset = kv_len - qo_len;
    chunk = std::min(kv_len, kMaxChunk);
    span = std::min(qo_len, kSpan * block);
    pairs = shape.batch * shape.num_kv_heads;
    const int64_t rows = int64_t{block} * shape.group;
    const int64_t pair_bytes = rows * chunk * (shape.fp32_scores ? 4 : 2);
    const auto most = static_cast<int32_t>(std::clamp<int64_t>(kScoreBytes / pair_bytes, 1, 32768));
    lanes = pairs * pair_bytes > kScoreBytes / 4 ? std::min(pairs, kMaxLanes) : 1;
    num_units = std::min(round_up(ceil_div(pairs, most), lanes), pairs);
    unit = ceil_div(pairs, num_units);
    num_units = ceil_div(pairs, unit);

    int64_t end = 0;
    const auto take = [&end](int64_t bytes) {
      const int64_t begin = end;
      end += (bytes + 255) / 256 * 256;
      return begin;
    };
    q = take(int64_t{unit} * qo_len * shape.group * shape.head_dim * 2);
    k = take(int64_t{unit} * kv_len * shape.head_dim * 2);
    v = take(int64_t{unit} * kv_len * shape.head_dim * 2);
    scores = take(unit * pair_bytes);
    const int64_t open_rows = int64_t{unit} * span * shape.group;
    o = take(open_rows * shape.head_dim * 4);
    max = take(open_rows * 4);
    sum = take(open_rows * 4);
    lane_bytes = end;
  }

  int64_t bytes() const { return lanes * lane_bytes; }
  int32_t pairs_of(int32_t index) const { return std::min(unit, pairs - index * unit); }
  // Keys that some query of the block from `first_query` on can see.
  int32_t visible(int32_t first_query, bool causal) const {
    return causal ? std::max(offset + first_query + block, 0) : kv_len;
  }

 private:
  static int32_t round_up(int32_t x, int32_t y) { return ceil_div(x, y) * y; }
};

}  // namespace flashcore
