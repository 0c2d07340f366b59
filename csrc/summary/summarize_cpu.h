// A page's summary on the CPU: see summarize.cuh.
#pragma once

#include <cmath>
#include <vector>

#include "summary/element_cpu.h"
#include "summary/rules.h"

namespace flashcore {

template <class T, class S>
void summarize_page(const SummarizeParams& p, int64_t page, int32_t tokens) {
  const int32_t dim = p.head_dim, vectors = p.summaries.vectors();
  std::vector<float> first(dim), second(dim);
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + head * p.k_stride_head;
    const auto key = [&](int32_t t, int32_t c) { return to_float(k[t * p.k_stride_token + c]); };
    for (int32_t c = 0; c < dim; ++c) first[c] = second[c] = key(0, c);
    if (p.summaries.kind == SummaryKind::min_max) {
      for (int32_t t = 1; t < tokens; ++t) {
        for (int32_t c = 0; c < dim; ++c) {
          first[c] = smaller(first[c], key(t, c));
          second[c] = larger(second[c], key(t, c));
        }
      }
    } else {
      for (int32_t t = 1; t < tokens; ++t) {
        for (int32_t c = 0; c < dim; ++c) first[c] += key(t, c);
      }
      for (float& mean : first) mean /= static_cast<float>(tokens);
    }
    if (p.summaries.kind == SummaryKind::mean_std) {
      std::fill(second.begin(), second.end(), 0.0f);
      for (int32_t t = 0; t < tokens; ++t) {
        for (int32_t c = 0; c < dim; ++c) {
          const float distance = key(t, c) - first[c];
          second[c] += distance * distance;
        }
      }
      for (float& square : second) square = std::sqrt(square / static_cast<float>(tokens));
    }
    S* out = static_cast<S*>(p.summaries.data) + (page * p.num_kv_heads + head) * vectors * dim;
    for (int32_t c = 0; c < dim; ++c) out[c] = from_float<S>(first[c]);
    for (int32_t c = 0; c < dim && vectors == 2; ++c) out[dim + c] = from_float<S>(second[c]);
  }
}

}  // namespace flashcore
