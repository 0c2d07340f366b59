// torch.ops.flashcore: the schemas, and which function serves them where. Only this file and ops/ know torch.
//
// Every op fills buffers that the caller owns. None but cublaslt_plan allocates or waits for the device, so all others
// can be captured in a CUDA graph. Built on libtorch's stable ABI: one library for every torch from
// TORCH_TARGET_VERSION on.
#include "ops/ops.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/kernels.h"
#include "ops/variants.h"

#ifdef FLASHCORE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace flashcore {

std::string build_info() {
#ifdef FLASHCORE_WITH_CUDA
  int cudart = 0;
  cudaRuntimeGetVersion(&cudart);
  const std::string cuda = "\"cuda\": true, \"nvcc\": \"" FLASHCORE_NVCC "\", \"archs\": \"" FLASHCORE_ARCHS
                           "\", \"cudart\": " +
                           std::to_string(cudart);
#else
  const std::string cuda = "\"cuda\": false, \"nvcc\": null, \"archs\": \"\", \"cudart\": null";
#endif
  const std::string cublaslt = std::to_string(cublaslt_version != nullptr ? cublaslt_version() : 0);
  return "{" + cuda + ", \"cublaslt\": " + cublaslt + ", \"variants\": [" + variant_names(true) + "], \"missing\": {" +
         missing_variants() + "}}";
}

}  // namespace flashcore

STABLE_TORCH_LIBRARY(flashcore, m) {
  m.def(
      "page_table(Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, int page_size, "
      "Tensor(a!) kv_indptr, Tensor(b!) kv_indices, Tensor(c!) last_page_len) -> ()");
  m.def(
      "plan(Tensor(a!)[] plan, Tensor(b!) scratch, int num_tokens, int num_kv_heads, int group, int page_size, "
      "int num_pages, int rows_per_tile, int max_partials, bool causal, int window_left, int policy, int sink_pages, "
      "int recent_pages, int budget_pages, int budget_share, int list_pages, int sparse_begin, bool share, "
      "int pack_keys, int split_keys, bool beside=False) -> ()");
  m.def(
      "attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] plan, Tensor(a!) partial_o, Tensor(b!) partial_lse, "
      "Tensor(c!) out, Tensor(d!)? lse, int rows_per_tile, float sm_scale, bool causal, int window_left, "
      "float logits_soft_cap, bool decode, str variant, Tensor(e!)? workspace=None, int max_qo_len=0, "
      "int max_kv_len=0, bool fp32_scores=True, bool free_cuts=False) -> ()");
  m.def(
      "summarize(Tensor k_cache, Tensor kv_indptr, Tensor kv_indices, Tensor last_page_len, Tensor? first_page, "
      "int max_columns, int summary_kind, Tensor(a!) summaries) -> ()");
  m.def(
      "store(Tensor k, Tensor v, Tensor slots, Tensor? qo_indptr, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor kv_indptr, Tensor kv_indices, Tensor last_page_len, Tensor? first_page, int max_columns, "
      "int summary_kind, Tensor(c!) summaries) -> ()");
  m.def(
      "select(Tensor q, Tensor k_cache, Tensor(a!)[] plan, Tensor summaries, Tensor(b!) scores, int max_columns, "
      "int summary_kind, int group_reduction, float std_weight, float sm_scale, int mass_share, int sink_pages, "
      "int recent_pages, int budget_pages, int budget_share, int list_pages, int sparse_begin) -> ()");
  m.def(
      "select_attend(Tensor q, Tensor(g!) k_cache, Tensor(h!) v_cache, Tensor(a!)[] plan, Tensor(b!) partial_o, "
      "Tensor(c!) partial_lse, Tensor(d!) out, Tensor(e!)? lse, int rows_per_tile, float sm_scale, "
      "float logits_soft_cap, str variant, bool free_cuts, Tensor(i!) summaries, Tensor(f!) scores, int max_columns, "
      "int summary_kind, int group_reduction, float std_weight, int mass_share, int sink_pages, int recent_pages, "
      "int budget_pages, int budget_share, int list_pages, int sparse_begin, Tensor? k, Tensor? v, Tensor? slots, "
      "bool early) -> ()");
  m.def(
      "cublaslt_workspace(int batch, int max_qo_len, int max_kv_len, int num_kv_heads, int group, int head_dim, "
      "bool fp16, bool causal, bool fp32_scores, int matmul_bytes) -> int");
  m.def(
      "cublaslt_plan(Tensor(a!) workspace, int batch, int max_qo_len, int max_kv_len, int num_kv_heads, int group, "
      "int head_dim, bool fp16, bool causal, bool fp32_scores, int matmul_bytes, str known, bool measure) -> str");
  m.def("build_info() -> str");
}

#define FLASHCORE_REGISTER(key)                                    \
  STABLE_TORCH_LIBRARY_IMPL(flashcore, key, m) {                   \
    m.impl("page_table", TORCH_BOX(&flashcore::page_table));       \
    m.impl("plan", TORCH_BOX(&flashcore::plan));                   \
    m.impl("attend", TORCH_BOX(&flashcore::attend));               \
    m.impl("summarize", TORCH_BOX(&flashcore::summarize));         \
    m.impl("store", TORCH_BOX(&flashcore::store));                 \
    m.impl("select", TORCH_BOX(&flashcore::select));               \
    m.impl("select_attend", TORCH_BOX(&flashcore::select_attend)); \
  }
FLASHCORE_REGISTER(CPU)
#ifdef FLASHCORE_WITH_CUDA
FLASHCORE_REGISTER(CUDA)
STABLE_TORCH_LIBRARY_IMPL(flashcore, CUDA, m) { m.impl("cublaslt_plan", TORCH_BOX(&flashcore::cublaslt_plan)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(flashcore, CompositeExplicitAutograd, m) {
  m.impl("cublaslt_workspace", TORCH_BOX(&flashcore::cublaslt_workspace));
  m.impl("build_info", TORCH_BOX(&flashcore::build_info));
}
