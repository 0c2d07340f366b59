// What the CPU's and the GPU's page selection agree on.
//
//   score(page) = reduction over the query heads g of the group of  a . first + weight * (b . second)
//
//   kind       first    second      a           b           weight
//   mean_std   mean     deviation   q_g         |q_g|       std_weight   (what most keys of the page can reach)
//   min_max    minimum  maximum     min(q_g,0)  max(q_g,0)  1            (what no key of the page exceeds: Quest)
//   mean       mean     -           q_g         -           -
//
// A product of two 16-bit floats is exact in fp32. Sums on the CPU: each block of 8 channels in order, then the blocks
// pairwise, from the far half to the near one; heads in order. On the GPU: as tensor cores add, heads pairwise. What is
// chosen from equal scores is the same to the last bit.
#pragma once

#include <bit>
#include <limits>

#include "arithmetic.h"
#include "plan/schedule.h"

namespace flashcore {

constexpr int kBlock = 8;  // channels that one lane sums up: 16 bytes of 16-bit elements

// --- Arithmetic that no compiler fuses

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

// 2^-t for 0 <= t < 126, to 1e-7; exactly 1 for 0.
FLASHCORE_HD float power_of_half(float t) {
  constexpr float kExp2[] = {-9.4755366e-4f, 9.2108757e-3f, -5.5299606e-2f, 0.24017949f, -0.69314322f, 1.0f};
  const int32_t whole = static_cast<int32_t>(t);
  return multiply(polynomial(kExp2, add(t, -static_cast<float>(whole))), std::bit_cast<float>((127 - whole) << 23));
}

// log(exp(a) + exp(b)), to 1e-6: the larger one + log(1 + 2^-t) for a distance of t / log2(e).
FLASHCORE_HD float log_sum_exp(float a, float b) {
  constexpr float kLog1p[] = {-8.574676e-3f, 4.4214193e-2f, -0.10785368f, 0.17757025f,
                              -0.24499612f,  0.33276176f,   -0.49997449f, 0.99999982f};
  const float top = larger(a, b);
  const float t = multiply(add(top, -smaller(a, b)), kLog2E);
  if (!(t < 25.0f)) return top;  // too far to matter, or not a number
  const float power = power_of_half(t);
  return add(top, multiply(polynomial(kLog1p, power), power));
}

// --- Scores

// What vector 0 or 1 of a summary is multiplied with.
FLASHCORE_HD float query_form(SummaryKind kind, int32_t vector, float q) {
  if (kind == SummaryKind::min_max) return vector == 0 ? smaller(q, 0.0f) : larger(q, 0.0f);
  return vector == 0 ? q : std::bit_cast<float>(std::bit_cast<uint32_t>(q) & 0x7fffffffu);
}

// How the two products, and then the heads of a group, become one score.
struct ScoreRule {
  GroupReduction reduction;
  float weight;    // of the second vector
  float sm_scale;  // to logits, for logsumexp

  FLASHCORE_HD explicit ScoreRule(const SelectParams& p)
      : reduction(p.group_reduction),
        weight(p.pages.summaries.kind == SummaryKind::mean_std ? p.std_weight : 1.0f),
        sm_scale(p.sm_scale) {}
  FLASHCORE_HD float join(float first, float second) const { return add(first, multiply(weight, second)); }

  // A head's part in the reduction; that of a head which does not exist; two parts. A mean's divisor does not change
  // the order and is left out.
  template <GroupReduction kReduction>
  FLASHCORE_HD float of_head(float score) const {
    return kReduction == GroupReduction::logsumexp ? multiply(score, sm_scale) : score;
  }
  template <GroupReduction kReduction>
  FLASHCORE_HD float nothing() const {
    return kReduction == GroupReduction::mean ? 0.0f : -std::numeric_limits<float>::infinity();
  }
  template <GroupReduction kReduction>
  FLASHCORE_HD float combine(float a, float b) const {
    if (kReduction == GroupReduction::max) return larger(a, b);
    return kReduction == GroupReduction::mean ? add(a, b) : log_sum_exp(a, b);
  }
};

// Unsigned integers in the order of floats.
FLASHCORE_HD uint32_t sort_key(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FLASHCORE_HD float score_of(uint32_t key) { return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// --- Top-p
//
// Twilight (arXiv 2502.02770): of the pages that fit the budget as many as have a share p of the softmax, taking the
// scores of all pages for logits. A page's mass is 2^(its logit - the best one's) in units of 2^-bits, a whole number:
// sums do not depend on their order. It is 1 at least, and the masses of a KV head add up to less than 2^31. All pages
// that have a score are full, so that none stands for more keys than another.
struct MassRule {
  static constexpr int32_t kWhole = 65536;  // of SelectParams::mass_share

  float best, scale, unit;  // the best score; from scores to logits in base 2; 2^bits

  FLASHCORE_HD MassRule(const SelectParams& p, float best, int32_t columns)
      : best(best),
        scale(p.group_reduction == GroupReduction::logsumexp ? kLog2E : multiply(p.sm_scale, kLog2E)),
        unit(static_cast<float>(1 << (30 - std::bit_width(static_cast<uint32_t>(columns))))) {
    // Such a score is the sum of the group's.
    if (p.group_reduction == GroupReduction::mean) scale /= static_cast<float>(p.num_qo_heads / p.pages.num_kv_heads);
  }
  FLASHCORE_HD int32_t of(float score) const {
    const float t = multiply(add(best, -score), scale);
    const int32_t mass = t < 31.0f ? static_cast<int32_t>(multiply(power_of_half(t), unit)) : 0;
    return mass > 1 ? mass : 1;
  }
};

FLASHCORE_HD bool has_top_p(const SelectParams& p) { return p.mass_share < MassRule::kWhole; }

// Of the mass of all pages, what is enough; at least 1.
FLASHCORE_HD int32_t enough_mass(const SelectParams& p, int32_t all) {
  return static_cast<int32_t>((int64_t{all} * p.mass_share + MassRule::kWhole - 1) / MassRule::kWhole);
}

// --- What is chosen from

// The page columns of a request: sinks | [middle_begin, middle_end) to choose from | recent.
struct Choice {
  int32_t pages;   // of the request
  int32_t budget;  // pages to read; none are chosen where the request has no more
  int32_t middle_begin, middle_end;
  const int32_t* table;  // page ids

  FLASHCORE_HD Choice(const SelectParams& p, int32_t r) : Choice(p, p.plan.kv_indptr[r], p.plan.kv_indptr[r + 1]) {}
  // Of the request whose page ids are kv_indices[begin, end).
  FLASHCORE_HD Choice(const SelectParams& p, int32_t begin, int32_t end) {
    pages = end - begin;
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

// Ends the tiles of a request and KV head with their list of `pages` pages. A thread takes every step-th tile.
FLASHCORE_HD void end_tiles(const SelectParams& p, int32_t r, int32_t kv_head, int32_t pages, int32_t first,
                            int32_t step) {
  const Plan& plan = p.plan;
  const int32_t row = plan.merge_rows[2 * plan.merge_indptr[plan.qo_indptr[r]]];  // a sparse request is in one alone
  const int32_t* tiles = plan.pair_tiles + 2 * (row * p.pages.num_kv_heads + kv_head);
  const int32_t end = tiles[1];
  const int32_t keys = (pages - 1) * p.pages.page_size + plan.last_page_len[r];
  for (int32_t t = tiles[0] + first; t < end; t += step) {
    const int32_t planned = t + 1 < end ? plan.tiles[t + 1].kv_begin : plan.rows[row].kv_len;
    const int32_t kv_end = keys < planned ? keys : planned, kv_begin = plan.tiles[t].kv_begin;
    plan.tiles[t].kv_end = kv_end > kv_begin ? kv_end : kv_begin;
  }
}

// The page that a step has filled, or -1: the last one of a request where its summary is due.
FLASHCORE_HD int32_t filled_page(const SummarizeParams& p, int32_t r) {
  const int32_t end = p.kv_indptr[r + 1];
  return end > p.kv_indptr[r] && p.last_page_len[r] == p.page_size ? p.kv_indices[end - 1] : -1;
}

}  // namespace flashcore
