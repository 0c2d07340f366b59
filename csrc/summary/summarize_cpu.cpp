// Page summaries on CPU threads: see summarize.cu.
#include "summary/summarize_cpu.h"

#include <algorithm>

#include "attend/threads_cpu.h"

namespace flashcore {

int run_summarize_cpu(const SummarizeParams& p) {
  with_elements(p, [&](auto key, auto summary) {
    using T = decltype(key);
    using S = decltype(summary);
    parallel_for(p.batch, [&](int r) {
      const int32_t begin = p.kv_indptr[r], pages = p.kv_indptr[r + 1] - begin;
      for (int32_t column = std::max(p.first_page[r], 0); column < pages; ++column) {
        const int32_t tokens = column + 1 < pages ? p.page_size : p.last_page_len[r];
        if (tokens > 0) summarize_page<T, S>(p, p.kv_indices[begin + column], tokens);
      }
    });
  });
  return 0;
}

}  // namespace flashcore
