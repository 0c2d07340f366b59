// What the CPU's and the GPU's page selection agree on, to the last bit.
//
//   score(page) = reduction over the query heads g of the group of  a . first + weight * (b . second)
//
//   kind       first    second      a           b           weight
//   mean_std   mean     deviation   q_g         |q_g|       std_weight   (what most keys of the page can reach)
//   min_max    minimum  maximum     min(q_g,0)  max(q_g,0)  1            (what no key of the page exceeds: Quest)
//   mean       mean     -           q_g         -           -
//
// Sums: each block of 8 channels in order, then the blocks pairwise, from the far half to the near one. A product of
// two 16-bit floats is exact in fp32, so it does not matter whether a machine fuses the additions of those; no others
// are.
#pragma once

#include <bit>

#include "plan/schedule.h"

namespace flashcore {

constexpr int kBlock = 8;  // channels that one lane sums up: 16 bytes of 16-bit elements

// --- Arithmetic that no compiler fuses
// --------------------------------------------------------------------------------

FLASHCORE_HD float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;  // the build says -ffp-contract=off
#endif
}

FLASHCORE_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// Comparisons rather than fmin and fmax, which may give either of two zeros.
FLASHCORE_HD float smaller(float a, float b) { return b < a ? b : a; }
FLASHCORE_HD float larger(float a, float b) { return b > a ? b : a; }

template <int kCount>
FLASHCORE_HD float polynomial(const float (&coefficients)[kCount], float x) {  // the highest power first
  float value = coefficients[0];
  for (int i = 1; i < kCount; ++i) value = add(multiply(value, x), coefficients[i]);
  return value;
}

// log(exp(a) + exp(b)), to 1e-6: the larger one + log(1 + 2^-t) for a distance of t / log2(e).
FLASHCORE_HD float log_sum_exp(float a, float b) {
  constexpr float kExp2[] = {-9.4755366e-4f, 9.2108757e-3f, -5.5299606e-2f, 0.24017949f, -0.69314322f, 1.0f};
  constexpr float kLog1p[] = {-8.574676e-3f, 4.4214193e-2f, -0.10785368f, 0.17757025f,
                              -0.24499612f,  0.33276176f,   -0.49997449f, 0.99999982f};
  const float top = larger(a, b);
  const float t = multiply(add(top, -smaller(a, b)), 1.44269504f);
  if (!(t < 25.0f)) return top;  // too far to matter, or not a number
  const int32_t whole = static_cast<int32_t>(t);
  const float power =
      multiply(polynomial(kExp2, add(t, -static_cast<float>(whole))), std::bit_cast<float>((127 - whole) << 23));
  return add(top, multiply(polynomial(kLog1p, power), power));
}

// --- Scores
// ------------------------------------------------------------------------------------------------------------

// What vector 0 or 1 of a summary is multiplied with.
FLASHCORE_HD float query_form(SummaryKind kind, int32_t vector, float q) {
  if (kind == SummaryKind::min_max) return vector == 0 ? smaller(q, 0.0f) : larger(q, 0.0f);
  return vector == 0 || q > 0.0f ? q : -q;
}

// How the two products, and then the heads of a group, become one score.
struct ScoreRule {
  GroupReduction reduction;
  float weight;  // of the second vector
  float scale;   // to logits for logsumexp, else 1

  FLASHCORE_HD explicit ScoreRule(const SelectParams& p)
      : reduction(p.group_reduction),
        weight(p.pages.summaries.kind == SummaryKind::mean_std ? p.std_weight : 1.0f),
        scale(reduction == GroupReduction::logsumexp ? p.sm_scale : 1.0f) {}
  FLASHCORE_HD float join(float first, float second) const { return add(first, multiply(weight, second)); }
  // The first `heads` heads gave `reduced`. A mean's divisor does not change the order and is left out.
  FLASHCORE_HD float reduce(int32_t heads, float reduced, float score) const {
    score = multiply(score, scale);
    if (heads == 0) return score;
    if (reduction == GroupReduction::max) return larger(reduced, score);
    return reduction == GroupReduction::mean ? add(reduced, score) : log_sum_exp(reduced, score);
  }
};

// Unsigned integers in the order of floats.
FLASHCORE_HD uint32_t sort_key(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// --- What is chosen from
// ------------------------------------------------------------------------------------------------

// The page columns of a request: sinks | [middle_begin, middle_end) to choose from | recent.
struct Choice {
  int32_t pages;   // of the request
  int32_t budget;  // pages to read; none are chosen where the request has no more
  int32_t middle_begin, middle_end;
  const int32_t* table;  // page ids

  FLASHCORE_HD Choice(const SelectParams& p, int32_t r) {
    const int32_t begin = p.plan.kv_indptr[r];
    pages = p.plan.kv_indptr[r + 1] - begin;
    budget = p.sparse.topk_pages(pages);
    middle_begin = p.sparse.sink_pages;
    const int32_t recent_begin = pages - p.sparse.recent_pages, scored = p.pages.max_columns;
    middle_end = recent_begin < scored ? recent_begin : scored;
    table = p.plan.kv_indices + begin;
  }
  FLASHCORE_HD bool needed() const { return pages > budget; }
  FLASHCORE_HD int32_t columns() const { return needed() ? middle_end - middle_begin : 0; }
  FLASHCORE_HD int32_t count(const SelectParams& p) const {
    return budget - p.sparse.sink_pages - p.sparse.recent_pages;
  }
};

FLASHCORE_HD int32_t* list_of(const SelectParams& p, int32_t r, int32_t kv_head) {
  return p.plan.kv_indices + p.sparse.begin + (int64_t{r} * p.pages.num_kv_heads + kv_head) * p.sparse.list_pages;
}

FLASHCORE_HD float* scores_of(const SelectParams& p, int32_t r, int32_t kv_head) {
  return p.scores + (int64_t{r} * p.pages.num_kv_heads + kv_head) * p.pages.max_columns;
}

// The page that a step has filled, or -1: the last one of a request where its summary is due.
FLASHCORE_HD int32_t filled_page(const SummarizeParams& p, int32_t r) {
  const int32_t end = p.kv_indptr[r + 1];
  return end > p.kv_indptr[r] && p.last_page_len[r] == p.page_size ? p.kv_indices[end - 1] : -1;
}

}  // namespace flashcore
