// Mean and standard deviation of K over each page, on CPU threads: see summarize.cu.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attend/threads_cpu.h"
#include "summary/element_cpu.h"

namespace flashcore {

namespace {

template <class T>
void summarize_page(const SummarizeParams& p, int32_t page, int32_t tokens) {
  const int32_t dim = p.head_dim;
  std::vector<float> mean(dim), square(dim);
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    const T* k = static_cast<const T*>(p.k) + page * p.k_stride_page + head * p.k_stride_head;
    std::fill(mean.begin(), mean.end(), 0.0f);
    std::fill(square.begin(), square.end(), 0.0f);
    for (int32_t t = 0; t < tokens; ++t) {
      for (int32_t c = 0; c < dim; ++c) mean[c] += to_float(k[t * p.k_stride_token + c]);
    }
    for (float& m : mean) m /= static_cast<float>(tokens);
    for (int32_t t = 0; t < tokens; ++t) {
      for (int32_t c = 0; c < dim; ++c) {
        const float distance = to_float(k[t * p.k_stride_token + c]) - mean[c];
        square[c] += distance * distance;
      }
    }
    T* out = static_cast<T*>(p.summaries) + (int64_t{page} * 2 * p.num_kv_heads + head) * dim;
    T* deviation = out + int64_t{p.num_kv_heads} * dim;
    for (int32_t c = 0; c < dim; ++c) {
      out[c] = from_float<T>(mean[c]);
      deviation[c] = from_float<T>(std::sqrt(square[c] / static_cast<float>(tokens)));
    }
  }
}

}  // namespace

int run_summarize_cpu(const SummarizeParams& p) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(p.batch, [&](int r) {
      const int32_t begin = p.kv_indptr[r], pages = p.kv_indptr[r + 1] - begin;
      const int32_t first = p.first_page ? std::max(p.first_page[r], 0) : std::max(pages - 1, 0);
      for (int32_t column = first; column < pages; ++column) {
        const int32_t tokens = column + 1 < pages ? p.page_size : p.last_page_len[r];
        if (tokens > 0) summarize_page<T>(p, p.kv_indices[begin + column], tokens);
      }
    });
  });
  return 0;
}

}  // namespace flashcore
