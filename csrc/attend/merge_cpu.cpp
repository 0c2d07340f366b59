// merge: the partial results of each query token become one, in the order of merge_order.h.
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// Method: the merge of softmax states of FlashAttention / FlashInfer (arXiv:2205.14135, arXiv:2501.01005).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arithmetic.h"
#include "attend/element_cpu.h"
#include "attend/merge_order.h"
#include "attend/threads_cpu.h"
#include "params.h"

namespace flashcore {
namespace {

constexpr float kNoKeys = -std::numeric_limits<float>::infinity();

// Calls visit(partial row) for each partial result of query head `head` of a token; false if it was written directly.
template <class Visit>
bool for_each_partial(const AttendParams& params, int token, int head, Visit visit) {
  const Plan& plan = params.plan;
  const int group = params.num_qo_heads / params.num_kv_heads;
  const int kv_head = head / group;
  for (int entry = plan.merge_indptr[token]; entry < plan.merge_indptr[token + 1]; ++entry) {
    const int row = plan.merge_rows[2 * entry], index = plan.merge_rows[2 * entry + 1];
    const int* tiles = plan.pair_tiles + 2 * (row * params.num_kv_heads + kv_head);
    for (int tile = tiles[0]; tile < tiles[1]; ++tile) {
      if (plan.tiles[tile].partial < 0) return false;
      visit(static_cast<int64_t>(plan.tiles[tile].partial) + index * group + head % group);
    }
  }
  return true;
}

// `sums`: scratch, [kMergeSums, head_dim].
template <class T>
void merge_head(const AttendParams& params, int token, int head, std::vector<float>& sums) {
  float max_lse = kNoKeys;
  const bool partial =
      for_each_partial(params, token, head, [&](int64_t i) { max_lse = std::max(max_lse, params.partial_lse[i]); });
  if (!partial) return;

  const int head_dim = params.head_dim;
  std::fill(sums.begin(), sums.end(), 0.f);
  float weights[kMergeSums] = {};
  if (max_lse != kNoKeys) {  // else (-inf) - (-inf) would be NaN
    int n = 0;
    for_each_partial(params, token, head, [&](int64_t i) {
      const float weight = std::exp2(params.partial_lse[i] - max_lse);
      const float* partial_o = params.partial_o + i * head_dim;
      const int which = n++ % kMergeSums;
      weights[which] += weight;
      if (weight == 0.f) return;
      float* sum = sums.data() + which * head_dim;
      for (int d = 0; d < head_dim; ++d) sum[d] += weight * partial_o[d];
    });
  }
  const float weight_sum = add_merge_sums(weights[0], weights[1], weights[2], weights[3]);
  const float scale = weight_sum > 0.f ? 1.f / weight_sum : 0.f;
  const int64_t out_row = static_cast<int64_t>(token) * params.num_qo_heads + head;
  T* out = static_cast<T*>(params.out) + out_row * head_dim;
  const float* sum = sums.data();
  for (int d = 0; d < head_dim; ++d) {
    const float all = add_merge_sums(sum[d], sum[head_dim + d], sum[2 * head_dim + d], sum[3 * head_dim + d]);
    out[d] = from_float<T>(all * scale);
  }
  if (params.lse) params.lse[out_row] = max_lse == kNoKeys ? kNoKeys : max_lse + std::log2(weight_sum);
}

template <class T>
void merge_tokens(const AttendParams& params) {
  constexpr int kTokensPerTask = 16;
  parallel_for(ceil_div(params.num_tokens, kTokensPerTask), [&](int task) {
    std::vector<float> sums(kMergeSums * params.head_dim);
    const int end = std::min((task + 1) * kTokensPerTask, params.num_tokens);
    for (int token = task * kTokensPerTask; token < end; ++token) {
      for (int head = 0; head < params.num_qo_heads; ++head) merge_head<T>(params, token, head, sums);
    }
  });
}

}  // namespace

int run_merge_cpu(const AttendParams& params) {
  switch (params.dtype) {
    case DType::bf16:
      merge_tokens<Bf16>(params);
      break;
    case DType::fp16:
      merge_tokens<Fp16>(params);
      break;
    case DType::fp32:
      merge_tokens<float>(params);
      break;
  }
  return 0;
}

}  // namespace flashcore
