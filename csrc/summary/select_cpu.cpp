// Page selection on CPU threads: see score.cuh and select.cu. One task for each request, or stretch that requests
// share, and KV head.
#include <algorithm>
#include <atomic>
#include <vector>

#include "attend/threads_cpu.h"
#include "summary/summarize_cpu.h"

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

float dot(const Blocks& query, const Blocks& summary, float* sums) {
  const int32_t lanes = query.lanes;
  std::fill(sums, sums + lanes, 0.0f);
  for (int32_t j = 0; j < kBlock; ++j) {
    const float* a = query.values.data() + j * lanes;
    const float* b = summary.values.data() + j * lanes;
    for (int32_t i = 0; i < lanes; ++i) sums[i] = sums[i] + a[i] * b[i];
  }
  for (int32_t half = lanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  return sums[0];
}

// The first `heads` heads gave `reduced`.
template <GroupReduction kReduction>
float reduce(const ScoreRule& rule, int32_t heads, float reduced, float score) {
  const float own = rule.of_head<kReduction>(score);
  return heads == 0 ? own : rule.combine<kReduction>(reduced, own);
}

float reduce(const ScoreRule& rule, int32_t heads, float reduced, float score) {
  if (rule.reduction == GroupReduction::max) return reduce<GroupReduction::max>(rule, heads, reduced, score);
  if (rule.reduction == GroupReduction::mean) return reduce<GroupReduction::mean>(rule, heads, reduced, score);
  return reduce<GroupReduction::logsumexp>(rule, heads, reduced, score);
}

// Scores the columns [begin, end) of a page table for each of the requests, which all have these pages there.
template <class T, class S>
void score_pages(const SelectParams& p, const int32_t* table, int32_t begin, int32_t end,
                 const std::vector<int32_t>& requests, int32_t kv_head) {
  const int32_t group = p.num_qo_heads / p.pages.num_kv_heads, dim = p.pages.head_dim;
  const int32_t vectors = p.pages.summaries.vectors(), queries = group * vectors;
  const ScoreRule rule(p);
  std::vector<Blocks> query(requests.size() * queries, Blocks(dim));
  for (size_t i = 0; i < query.size(); ++i) {
    const int64_t token = p.plan.qo_indptr[requests[i / queries]], head = kv_head * group + i % queries / vectors;
    query[i].load(static_cast<const T*>(p.q) + token * p.q_stride_token + head * p.q_stride_head, dim);
    for (float& q : query[i].values) q = query_form(p.pages.summaries.kind, i % vectors, q);
  }
  Blocks first(dim), second(dim);
  std::vector<float> sums(first.lanes);
  for (int32_t column = begin; column < end; ++column) {
    const S* summary = static_cast<const S*>(p.pages.summaries.data) +
                       (int64_t{table[column]} * p.pages.num_kv_heads + kv_head) * vectors * dim;
    first.load(summary, dim);
    if (vectors == 2) second.load(summary + dim, dim);
    for (size_t m = 0; m < requests.size(); ++m) {
      const Blocks* own = query.data() + m * queries;
      float score = 0.0f;
      for (int32_t g = 0; g < group; ++g) {
        float head = dot(own[g * vectors], first, sums.data());
        if (vectors == 2) head = rule.join(head, dot(own[g * vectors + 1], second, sums.data()));
        score = reduce(rule, g, score, head);
      }
      scores_of(p, requests[m], kv_head)[column] = score;
    }
  }
}

constexpr int32_t kPieceColumns = 64;  // of a stretch are a task: one document may be all there is

template <class T, class S>
void score_stretch(const SelectParams& p, int32_t i, int32_t kv_head, int32_t piece) {
  const Stretch& stretch = p.plan.stretches[i];
  const int32_t begin = std::max({stretch.begin, p.sparse.sink_pages, piece * kPieceColumns});
  const int32_t end = std::min({stretch.end, p.pages.max_columns, (piece + 1) * kPieceColumns});
  if (begin >= end) return;
  std::vector<int32_t> requests;
  for (const Stretch* sharer = &stretch - stretch.rank; sharer <= &stretch; ++sharer) {
    requests.push_back(sharer->request);
  }
  score_pages<T, S>(p, p.plan.kv_indices + p.plan.kv_indptr[stretch.request], begin, end, requests, kv_head);
}

// How many of the best columns, which come in order, have mass enough; all of them where they have not.
int32_t count_enough(const SelectParams& p, const Choice& choice, const float* scores,
                     const std::vector<int32_t>& best) {
  const MassRule mass(p, scores[best[0]], choice.columns());
  int32_t all = 0, sum = 0, count = 0;
  for (int32_t c = choice.middle_begin; c < choice.middle_end; ++c) all += mass.of(scores[c]);
  const int32_t enough = enough_mass(p, all), most = static_cast<int32_t>(best.size());
  while (count < most && sum < enough) sum += mass.of(scores[best[count++]]);
  return count;
}

// Returns how many pages are chosen.
int32_t choose(const SelectParams& p, const Choice& choice, const float* scores, int32_t* list) {
  std::vector<int32_t> columns;
  for (int32_t c = choice.middle_begin; c < choice.middle_end; ++c) columns.push_back(c);
  const auto better = [&](int32_t a, int32_t b) {
    const uint32_t x = sort_key(scores[a]), y = sort_key(scores[b]);
    return x > y || (x == y && a < b);
  };
  std::nth_element(columns.begin(), columns.begin() + choice.count(p), columns.end(), better);
  columns.resize(choice.count(p));
  if (has_top_p(p)) {
    std::sort(columns.begin(), columns.end(), better);
    columns.resize(count_enough(p, choice, scores, columns));
  }
  std::sort(columns.begin(), columns.end());
  for (int32_t c = 0; c < p.sparse.sink_pages; ++c) *list++ = choice.table[c];
  for (const int32_t c : columns) *list++ = choice.table[c];
  for (int32_t c = choice.pages - p.sparse.recent_pages; c < choice.pages; ++c) *list++ = choice.table[c];
  return static_cast<int32_t>(columns.size());
}

}  // namespace

int run_select_cpu(const SelectParams& p) {
  with_elements(p.pages, [&](auto key, auto summary) {
    using T = decltype(key);
    using S = decltype(summary);
    const int32_t stretches = p.plan.counts[kNumStretches];
    const int32_t pieces = ceil_div(p.pages.max_columns, kPieceColumns), tasks = pieces * p.pages.num_kv_heads;
    parallel_for(stretches * tasks,
                 [&](int task) { score_stretch<T, S>(p, task / tasks, task % tasks / pieces, task % pieces); });
    parallel_for(p.pages.batch * p.pages.num_kv_heads, [&](int task) {
      const int32_t r = task / p.pages.num_kv_heads, kv_head = task % p.pages.num_kv_heads;
      const Choice choice(p, r);
      if (!choice.needed()) return;
      float* scores = scores_of(p, r, kv_head);
      if (stretches == 0) {
        score_pages<T, S>(p, choice.table, choice.middle_begin, choice.middle_end, {r}, kv_head);
      }
      const int32_t chosen = choose(p, choice, scores, list_of(p, r, kv_head)), dropped = choice.count(p) - chosen;
      if (!has_top_p(p)) return;
      end_tiles(p, r, kv_head, choice.budget - dropped, 0, 1);
      std::atomic_ref(p.plan.counts[kPagesDropped]) += dropped;
    });
  });
  return 0;
}

}  // namespace flashcore
