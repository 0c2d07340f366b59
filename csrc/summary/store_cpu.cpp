// New keys and values into their pages, and page summaries, on CPU threads: see store.cu.
#include <algorithm>

#include "attend/threads_cpu.h"
#include "summary/summarize_cpu.h"

namespace flashcore {

namespace {

template <class T>
void store_token(const StoreParams& p, int64_t token) {
  const SummarizeParams& s = p.pages;
  const NewTokens& from = p.tokens;
  const int64_t page = from.slots[token] / s.page_size, offset = from.slots[token] % s.page_size;
  T* k = static_cast<T*>(const_cast<void*>(s.k)) + page * s.k_stride_page + offset * s.k_stride_token;
  T* v = static_cast<T*>(p.v) + page * p.v_stride_page + offset * p.v_stride_token;
  const T* new_k = static_cast<const T*>(from.k) + token * from.k_stride_token;
  const T* new_v = static_cast<const T*>(from.v) + token * from.v_stride_token;
  for (int32_t head = 0; head < s.num_kv_heads; ++head) {
    std::copy_n(new_k + head * from.k_stride_head, s.head_dim, k + head * s.k_stride_head);
    std::copy_n(new_v + head * from.v_stride_head, s.head_dim, v + head * p.v_stride_head);
  }
}

}  // namespace

int run_store_cpu(const StoreParams& p) {
  const SummarizeParams& s = p.pages;
  with_elements(s, [&](auto key, auto summary) {
    using T = decltype(key);
    using S = decltype(summary);
    parallel_for(s.batch, [&](int r) {
      if (p.tokens.k != nullptr) {
        const int32_t* indptr = p.tokens.qo_indptr;
        const int64_t begin = indptr == nullptr ? r : indptr[r], end = indptr == nullptr ? r + 1 : indptr[r + 1];
        for (int64_t token = begin; token < end; ++token) store_token<T>(p, token);
      }
      if (s.first_page == nullptr) {
        const int32_t page = filled_page(s, r);
        if (page >= 0) summarize_page<T, S>(s, page, s.page_size);
        return;
      }
      const int32_t begin = s.kv_indptr[r], pages = s.kv_indptr[r + 1] - begin;
      for (int32_t column = std::max(s.first_page[r], 0); column < pages; ++column) {
        const int32_t tokens = column + 1 < pages ? s.page_size : s.last_page_len[r];
        if (tokens > 0) summarize_page<T, S>(s, s.kv_indices[begin + column], tokens);
      }
    });
  });
  return 0;
}

}  // namespace flashcore
