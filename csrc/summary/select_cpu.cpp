// Page selection on CPU threads: see select.cu. One task for each request and KV head.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attend/threads_cpu.h"
#include "summary/element_cpu.h"
#include "summary/rules.h"

namespace flashcore {

namespace {

// A head's channels with the blocks side by side: channel 8 b + j of block b stands at [j * lanes + b], so that blocks
// are summed up in vectors.
struct Blocks {
  int32_t lanes;  // blocks, rounded up to a power of two
  std::vector<float> values;

  explicit Blocks(int32_t dim) : lanes(std::bit_ceil(static_cast<uint32_t>((dim + kBlock - 1) / kBlock))) {
    values.assign(static_cast<size_t>(lanes) * kBlock, 0.0f);
  }
  template <class T>
  void load(const T* from, int32_t dim) {
    for (int32_t c = 0; c < dim; ++c) values[(c % kBlock) * lanes + c / kBlock] = to_float(from[c]);
  }
};

// q.mean + |q|.deviation, the latter already weighted.
float dot(const Blocks& q, const Blocks& weighted, const Blocks& mean, const Blocks& deviation, float* sums) {
  const int32_t lanes = q.lanes;
  std::fill(sums, sums + lanes, 0.0f);
  for (int32_t j = 0; j < kBlock; ++j) {
    const float* a = q.values.data() + j * lanes;
    const float* m = mean.values.data() + j * lanes;
    const float* w = weighted.values.data() + j * lanes;
    const float* d = deviation.values.data() + j * lanes;
    for (int32_t b = 0; b < lanes; ++b) {
      sums[b] = sums[b] + a[b] * m[b];
      sums[b] = sums[b] + w[b] * d[b];
    }
  }
  for (int32_t half = lanes / 2; half > 0; half /= 2) {
    for (int32_t b = 0; b < half; ++b) sums[b] = sums[b] + sums[b + half];
  }
  return sums[0];
}

template <class T>
void score_pages(const SelectParams& p, const Choice& choice, int32_t r, int32_t kv_head, float* scores) {
  const int32_t group = p.num_qo_heads / p.num_kv_heads, dim = p.head_dim;
  std::vector<Blocks> q(group, Blocks(dim)), weighted(group, Blocks(dim));
  for (int32_t g = 0; g < group; ++g) {
    q[g].load(
        static_cast<const T*>(p.q) + p.plan.qo_indptr[r] * p.q_stride_token + (kv_head * group + g) * p.q_stride_head,
        dim);
    for (size_t c = 0; c < q[g].values.size(); ++c) weighted[g].values[c] = p.std_weight * std::fabs(q[g].values[c]);
  }
  Blocks mean(dim), deviation(dim);
  std::vector<float> sums(mean.lanes);
  for (int32_t column = choice.middle_begin; column < choice.middle_end; ++column) {
    const T* summary =
        static_cast<const T*>(p.summaries) + (int64_t{choice.table[column]} * 2 * p.num_kv_heads + kv_head) * dim;
    mean.load(summary, dim);
    deviation.load(summary + int64_t{p.num_kv_heads} * dim, dim);
    float best = -INFINITY;
    for (int32_t g = 0; g < group; ++g) best = std::fmax(best, dot(q[g], weighted[g], mean, deviation, sums.data()));
    scores[column] = best;
  }
}

void choose(const SelectParams& p, const Choice& choice, const float* scores) {
  std::vector<int32_t> columns;
  for (int32_t c = choice.middle_begin; c < choice.middle_end; ++c) columns.push_back(c);
  const auto better = [&](int32_t a, int32_t b) {
    const uint32_t x = sort_key(scores[a]), y = sort_key(scores[b]);
    return x > y || (x == y && a < b);
  };
  std::nth_element(columns.begin(), columns.begin() + choice.count, columns.end(), better);
  columns.resize(choice.count);
  std::sort(columns.begin(), columns.end());
  int32_t* out = choice.list;
  for (int32_t c = 0; c < p.sink_pages; ++c) *out++ = choice.table[c];
  for (const int32_t c : columns) *out++ = choice.table[c];
  for (int32_t c = choice.pages - p.recent_pages; c < choice.pages; ++c) *out++ = choice.table[c];
}

}  // namespace

int run_select_cpu(const SelectParams& p) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(p.batch * p.num_kv_heads, [&](int task) {
      const int32_t r = task / p.num_kv_heads, kv_head = task % p.num_kv_heads;
      if (!selects(p, r)) return;
      const Choice choice(p, r, kv_head);
      float* scores = p.scores + int64_t{task} * p.max_columns;
      score_pages<T>(p, choice, r, kv_head, scores);
      choose(p, choice, scores);
    });
  });
  return 0;
}

}  // namespace flashcore
