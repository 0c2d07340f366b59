// torch.ops.flashcore as C++ functions. Schemas in ops.cpp; shapes and units in flashcore_sglang/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace flashcore {

using torch::stable::Tensor;

void page_table(const Tensor& req_to_token, const Tensor& req_pool_indices, const Tensor& seq_lens, int64_t page_size,
                const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len);

void plan(const std::vector<Tensor>& plan, const Tensor& scratch, int64_t num_tokens, int64_t num_kv_heads,
          int64_t group, int64_t page_size, int64_t num_pages, int64_t rows_per_tile, int64_t max_partials, bool causal,
          int64_t window_left, int64_t policy, int64_t sink_pages, int64_t recent_pages, int64_t budget_pages,
          int64_t budget_share, int64_t list_pages, int64_t sparse_begin, bool share, int64_t pack_keys,
          int64_t split_keys, bool beside);

void attend(const Tensor& q_tensor, const Tensor& k_cache, const Tensor& v_cache, const std::vector<Tensor>& plan,
            const Tensor& partial_o, const Tensor& partial_lse, const Tensor& out_tensor,
            const std::optional<Tensor>& lse_tensor, int64_t rows_per_tile, double sm_scale, bool causal,
            int64_t window_left, double logits_soft_cap, bool decode, const std::string& variant,
            const std::optional<Tensor>& workspace, int64_t max_qo_len, int64_t max_kv_len, bool fp32_scores,
            bool free_cuts);

void summarize(const Tensor& k_cache, const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len,
               const std::optional<Tensor>& first_page, int64_t max_columns, int64_t summary_kind,
               const Tensor& summaries);

void store(const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& slots_tensor,
           const std::optional<Tensor>& qo_indptr, const Tensor& k_cache, const Tensor& v_cache,
           const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len,
           const std::optional<Tensor>& first_page, int64_t max_columns, int64_t summary_kind, const Tensor& summaries);

void select(const Tensor& q, const Tensor& k_cache, const std::vector<Tensor>& plan, const Tensor& summaries,
            const Tensor& scores, int64_t max_columns, int64_t summary_kind, int64_t group_reduction, double std_weight,
            double sm_scale, int64_t mass_share, int64_t sink_pages, int64_t recent_pages, int64_t budget_pages,
            int64_t budget_share, int64_t list_pages, int64_t sparse_begin);

void select_attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const std::vector<Tensor>& plan,
                   const Tensor& partial_o, const Tensor& partial_lse, const Tensor& out,
                   const std::optional<Tensor>& lse, int64_t rows_per_tile, double sm_scale, double logits_soft_cap,
                   const std::string& variant, bool free_cuts, const Tensor& summaries, const Tensor& scores,
                   int64_t max_columns, int64_t summary_kind, int64_t group_reduction, double std_weight,
                   int64_t mass_share, int64_t sink_pages, int64_t recent_pages, int64_t budget_pages,
                   int64_t budget_share, int64_t list_pages, int64_t sparse_begin, const std::optional<Tensor>& k,
                   const std::optional<Tensor>& v, const std::optional<Tensor>& slots, bool early);

int64_t cublaslt_workspace(int64_t batch, int64_t max_qo_len, int64_t max_kv_len, int64_t num_kv_heads, int64_t group,
                           int64_t head_dim, bool fp16, bool causal, bool fp32_scores, int64_t matmul_bytes);

std::string cublaslt_plan(const Tensor& workspace, int64_t batch, int64_t max_qo_len, int64_t max_kv_len,
                          int64_t num_kv_heads, int64_t group, int64_t head_dim, bool fp16, bool causal,
                          bool fp32_scores, int64_t matmul_bytes, const std::string& known, bool measure);

std::string build_info();

}  // namespace flashcore
