// The page table of a batch, from SGLang's req_to_token: see page_table.cu.
#include <algorithm>

#include "params.h"

namespace flashcore {

int run_page_table_cpu(const PageTableParams& p) {
  int64_t pages = 0;
  p.kv_indptr[0] = 0;
  for (int32_t r = 0; r < p.batch; ++r) {
    const int64_t len = std::max<int64_t>(p.seq_lens[r], 0);
    const int64_t columns = (len + p.page_size - 1) / p.page_size;
    const int32_t* slots = p.req_to_token + p.req_pool_indices[r] * p.req_to_token_stride;
    for (int64_t column = 0; column < columns && pages + column < p.max_pages; ++column) {
      p.kv_indices[pages + column] = slots[column * p.page_size] / p.page_size;
    }
    pages += columns;
    p.kv_indptr[r + 1] = static_cast<int32_t>(pages);
    p.last_page_len[r] = static_cast<int32_t>(columns > 0 ? len - (columns - 1) * p.page_size : 0);
  }
  return 0;
}

}  // namespace flashcore
