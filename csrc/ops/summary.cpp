// Page summaries, and the pages of a budget that they choose.
#include <algorithm>

#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace flashcore {

namespace {

// The cache and its summaries; the page table is left to the caller.
SummarizeParams describe_pages(const char* op, const Tensor& k_cache, const Tensor& summaries_tensor, int64_t kind,
                               int64_t max_columns) {
  const TensorArg k = describe(op, "k_cache", k_cache);
  require_float(k);
  require_cache(k, k, kAnySize);
  require(kind >= 0 && kind <= static_cast<int64_t>(SummaryKind::mean), op,
          "summary_kind: expected 0 (mean_std), 1 (min_max) or 2 (mean), got ", kind, "; see planner.topk.SummaryKind");
  const TensorArg summaries = describe(op, "summaries", summaries_tensor);
  const PageSummaries pages{
      .data = summaries.data, .kind = static_cast<SummaryKind>(kind), .fp8 = summaries.scalar == Scalar::fp8};
  require_shape(summaries, {kAnySize, k.size(2), pages.vectors(), k.size(3)}, "(pages, kv_heads, vectors, head_dim)");
  require_buffer(summaries, 0, k.device, pages.fp8 ? Scalar::fp8 : k.scalar);
  return {
      .k = k.data,
      .summaries = pages,
      .k_stride_page = k.strides[0],
      .k_stride_token = k.strides[1],
      .k_stride_head = k.strides[2],
      .max_columns = static_cast<int32_t>(max_columns),
      .num_kv_heads = static_cast<int32_t>(k.size(2)),
      .head_dim = static_cast<int32_t>(k.size(3)),
      .page_size = static_cast<int32_t>(k.size(1)),
      .num_pages = static_cast<int32_t>(std::min(k.size(0), summaries.size(0))),
      .dtype = static_cast<DType>(k.scalar),
  };
}

}  // namespace

void summarize(const Tensor& k_cache, const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len,
               const Tensor& first_page, int64_t max_columns, int64_t summary_kind, const Tensor& summaries) {
  constexpr const char* kOp = "summarize";
  SummarizeParams params = describe_pages(kOp, k_cache, summaries, summary_kind, max_columns);
  const int device = describe(kOp, "k_cache", k_cache).device;
  const TensorArg last = describe(kOp, "last_page_len", last_page_len);
  require_buffer(last, 0, device);
  const int64_t batch = last.numel();
  params.kv_indptr = describe_ints(kOp, "kv_indptr", kv_indptr, batch + 1, device).as<int32_t>();
  params.kv_indices = describe_ints(kOp, "kv_indices", kv_indices, 0, device).as<int32_t>();
  params.last_page_len = last.as<int32_t>();
  params.first_page = describe_ints(kOp, "first_page", first_page, batch, device).as<int32_t>();
  params.batch = static_cast<int32_t>(batch);

  const Launch launch(device);
  params.stream = launch.stream();
  run(kOp, kOp, device == kCpu ? run_summarize_cpu : run_summarize_cuda, params);
}

void select(const Tensor& q_tensor, const Tensor& k_cache, const std::vector<Tensor>& plan, const Tensor& summaries,
            const Tensor& scores_tensor, int64_t max_columns, int64_t summary_kind, int64_t group_reduction,
            double std_weight, double sm_scale, int64_t mass_share, int64_t sink_pages, int64_t recent_pages,
            int64_t budget_pages, int64_t budget_share, int64_t list_pages, int64_t sparse_begin) {
  constexpr const char* kOp = "select";
  const TensorArg q = describe(kOp, "q", q_tensor);
  const int device = q.device;
  require_q(q);
  SummarizeParams pages = describe_pages(kOp, k_cache, summaries, summary_kind, max_columns);
  const TensorArg k = describe(kOp, "k_cache", k_cache);
  require_cache(k, q, q.size(2));
  const int64_t num_kv_heads = k.size(2);
  const int32_t group = require_group(kOp, q.size(1), num_kv_heads);
  require(group_reduction >= 0 && group_reduction <= static_cast<int64_t>(GroupReduction::logsumexp), kOp,
          "group_reduction: expected 0 (max), 1 (mean) or 2 (logsumexp), got ", group_reduction,
          "; see planner.topk.GroupReduction");
  require(recent_pages >= 1 && budget_pages > sink_pages + recent_pages && budget_pages <= list_pages, kOp,
          "budget_pages: expected more than sink_pages + recent_pages (at least 1) and at most list_pages, got ",
          budget_pages, " for ", sink_pages, " + ", recent_pages, " and ", list_pages,
          "; pass what the plan was made with");
  require(mass_share > 0 && mass_share <= 65536, kOp, "mass_share: expected 1 to 65536, got ", mass_share,
          "; pass 65536 to read the whole budget");
  const TensorArg scores = describe(kOp, "scores", scores_tensor);
  require_buffer(scores, q.size(0) * num_kv_heads * max_columns, device, Scalar::fp32);
  const auto [buffers, batch] = describe_plan(kOp, plan, device, q.size(0), num_kv_heads, group, 0);
  require(batch == q.size(0), kOp, "q: expected one query token for each of ", batch, " requests, got ", q.size(0),
          "; pages are selected for decode batches only");
  if (batch == 0) return;

  const Launch launch(device);
  pages.kv_indptr = buffers.kv_indptr;
  pages.kv_indices = buffers.kv_indices;
  pages.last_page_len = buffers.last_page_len;
  pages.batch = batch;
  pages.stream = launch.stream();
  const SelectParams params{
      .plan = buffers,
      .pages = pages,
      .q = q.data,
      .scores = scores.as<float>(),
      .q_stride_token = q.strides[0],
      .q_stride_head = q.strides[1],
      .group_reduction = static_cast<GroupReduction>(group_reduction),
      .std_weight = static_cast<float>(std_weight),
      .sm_scale = static_cast<float>(sm_scale),
      .mass_share = static_cast<int32_t>(mass_share),
      .num_qo_heads = static_cast<int32_t>(q.size(1)),
      .sparse = sparse_rows(sink_pages, recent_pages, budget_pages, budget_share, list_pages, sparse_begin),
      .num_sms = num_sms(device),
  };
  run(kOp, kOp, device == kCpu ? run_select_cpu : run_select_cuda, params);
}

}  // namespace flashcore
