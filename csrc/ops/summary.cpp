// Page summaries, and the pages of a budget that they choose.
#include <algorithm>

#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"
#include "ops/work.h"
#include "summary/rules.h"

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

// The cache, the page table of a batch, and the summaries to bring up to date.
SummarizeParams describe_summaries(const char* op, const Tensor& k_cache, const Tensor& kv_indptr,
                                   const Tensor& kv_indices, const Tensor& last_page_len,
                                   const std::optional<Tensor>& first_page, int64_t max_columns, int64_t summary_kind,
                                   const Tensor& summaries, int device) {
  SummarizeParams params = describe_pages(op, k_cache, summaries, summary_kind, max_columns);
  const TensorArg last = describe(op, "last_page_len", last_page_len);
  require_buffer(last, 0, device);
  const int64_t batch = last.numel();
  params.kv_indptr = describe_ints(op, "kv_indptr", kv_indptr, batch + 1, device).as<int32_t>();
  params.kv_indices = describe_ints(op, "kv_indices", kv_indices, 0, device).as<int32_t>();
  params.last_page_len = last.as<int32_t>();
  if (first_page) params.first_page = describe_ints(op, "first_page", *first_page, batch, device).as<int32_t>();
  params.batch = static_cast<int32_t>(batch);
  return params;
}

void run_store(const char* op, StoreParams params, int device) {
  const Launch launch(device);
  params.pages.stream = launch.stream();
  run(op, op, device == kCpu ? run_store_cpu : run_store_cuda, params);
}

}  // namespace

void summarize(const Tensor& k_cache, const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len,
               const std::optional<Tensor>& first_page, int64_t max_columns, int64_t summary_kind,
               const Tensor& summaries) {
  constexpr const char* kOp = "summarize";
  const int device = describe(kOp, "k_cache", k_cache).device;
  const SummarizeParams pages = describe_summaries(kOp, k_cache, kv_indptr, kv_indices, last_page_len, first_page,
                                                   max_columns, summary_kind, summaries, device);
  run_store(kOp, {.pages = pages}, device);
}

namespace {

// The new tokens of a step or of an extend, and the caches that they belong in; the caller adds their requests.
StoreParams describe_store(const char* op, const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& slots_tensor,
                           const Tensor& k_cache, const Tensor& v_cache, const SummarizeParams& pages) {
  const TensorArg k = describe(op, "k", k_tensor), v = describe(op, "v", v_tensor);
  require_q(k);
  require_q(v);
  const TensorArg cached_k = describe(op, "k_cache", k_cache), cached_v = describe(op, "v_cache", v_cache);
  require_cache(cached_k, k, k.size(2));
  require_cache(cached_v, k, k.size(2));
  require_shape(cached_v, {cached_k.size(0), cached_k.size(1), cached_k.size(2), k.size(2)}, "(as k_cache)");
  require_shape(k, {kAnySize, cached_k.size(2), k.size(2)}, "(tokens, kv_heads, head_dim)");
  require_shape(v, {k.size(0), k.size(1), k.size(2)}, "(as k)");
  require_scalar(v, {k.scalar});
  require_device(v, k.device);
  const TensorArg slots = describe(op, "slots", slots_tensor);
  require_buffer(slots, k.size(0), k.device, Scalar::int64);
  return {.pages = pages,
          .tokens = {.k = k.data,
                     .v = v.data,
                     .slots = slots.as<int64_t>(),
                     .k_stride_token = k.strides[0],
                     .k_stride_head = k.strides[1],
                     .v_stride_token = v.strides[0],
                     .v_stride_head = v.strides[1]},
          .v = cached_v.data,
          .v_stride_page = cached_v.strides[0],
          .v_stride_token = cached_v.strides[1],
          .v_stride_head = cached_v.strides[2]};
}

void require_one_each(const char* op, const TensorArg& k, int32_t batch) {
  require(k.size(0) == batch, op, "k: expected a token of each of ", batch, " requests, got ", k.size(0),
          "; pass one of each, or to op store qo_indptr and first_page, too");
}

}  // namespace

void store(const Tensor& k, const Tensor& v, const Tensor& slots, const std::optional<Tensor>& qo_indptr,
           const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_indptr, const Tensor& kv_indices,
           const Tensor& last_page_len, const std::optional<Tensor>& first_page, int64_t max_columns,
           int64_t summary_kind, const Tensor& summaries) {
  constexpr const char* kOp = "store";
  const TensorArg tokens = describe(kOp, "k", k);
  const int device = tokens.device;
  StoreParams params = describe_store(kOp, k, v, slots, k_cache, v_cache,
                                      describe_summaries(kOp, k_cache, kv_indptr, kv_indices, last_page_len, first_page,
                                                         max_columns, summary_kind, summaries, device));
  require(
      qo_indptr.has_value() == first_page.has_value(), kOp,
      "qo_indptr: expected it beside first_page, or neither (one token of each request), got one of them; pass both");
  if (qo_indptr) {
    params.tokens.qo_indptr = describe_ints(kOp, "qo_indptr", *qo_indptr, params.pages.batch + 1, device).as<int32_t>();
  } else {
    require_one_each(kOp, tokens, params.pages.batch);
  }
  run_store(kOp, params, device);
}

namespace {

SelectParams describe_select(const char* op, const Tensor& q_tensor, const Tensor& k_cache,
                             const std::vector<Tensor>& plan, const Tensor& summaries, const Tensor& scores_tensor,
                             int64_t max_columns, int64_t summary_kind, int64_t group_reduction, double std_weight,
                             double sm_scale, int64_t mass_share, const SparseRows& sparse) {
  const TensorArg q = describe(op, "q", q_tensor);
  const int device = q.device;
  require_q(q);
  SummarizeParams pages = describe_pages(op, k_cache, summaries, summary_kind, max_columns);
  const TensorArg k = describe(op, "k_cache", k_cache);
  require_cache(k, q, q.size(2));
  const int64_t num_kv_heads = k.size(2);
  const int32_t group = require_group(op, q.size(1), num_kv_heads);
  require(group_reduction >= 0 && group_reduction <= static_cast<int64_t>(GroupReduction::logsumexp), op,
          "group_reduction: expected 0 (max), 1 (mean) or 2 (logsumexp), got ", group_reduction,
          "; see planner.topk.GroupReduction");
  require(sparse.recent_pages >= 1 && sparse.budget_pages > sparse.sink_pages + sparse.recent_pages &&
              sparse.budget_pages <= sparse.list_pages,
          op, "budget_pages: expected more than sink_pages + recent_pages (at least 1) and at most list_pages, got ",
          sparse.budget_pages, " for ", sparse.sink_pages, " + ", sparse.recent_pages, " and ", sparse.list_pages,
          "; pass what the plan was made with");
  require(mass_share > 0 && mass_share <= 65536, op, "mass_share: expected 1 to 65536, got ", mass_share,
          "; pass 65536 to read the whole budget");
  const TensorArg scores = describe(op, "scores", scores_tensor);
  require_buffer(scores, q.size(0) * num_kv_heads * max_columns, device, Scalar::fp32);
  const auto [buffers, batch] = describe_plan(op, plan, device, q.size(0), num_kv_heads, group, 0);
  require(batch == q.size(0), op, "q: expected one query token for each of ", batch, " requests, got ", q.size(0),
          "; pages are selected for decode batches only");

  pages.kv_indptr = buffers.kv_indptr;
  pages.kv_indices = buffers.kv_indices;
  pages.last_page_len = buffers.last_page_len;
  pages.batch = batch;
  return {
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
      .sparse = sparse,
      .num_sms = num_sms(device),
  };
}

void run_select(const char* op, const SelectParams& params, int device) {
  run(op, "select", device == kCpu ? run_select_cpu : run_select_cuda, params);
}

}  // namespace

void select(const Tensor& q, const Tensor& k_cache, const std::vector<Tensor>& plan, const Tensor& summaries,
            const Tensor& scores, int64_t max_columns, int64_t summary_kind, int64_t group_reduction, double std_weight,
            double sm_scale, int64_t mass_share, int64_t sink_pages, int64_t recent_pages, int64_t budget_pages,
            int64_t budget_share, int64_t list_pages, int64_t sparse_begin) {
  constexpr const char* kOp = "select";
  const SparseRows sparse = sparse_rows(sink_pages, recent_pages, budget_pages, budget_share, list_pages, sparse_begin);
  SelectParams params = describe_select(kOp, q, k_cache, plan, summaries, scores, max_columns, summary_kind,
                                        group_reduction, std_weight, sm_scale, mass_share, sparse);
  if (params.pages.batch == 0) return;
  const int device = describe(kOp, "q", q).device;
  const Launch launch(device);
  params.pages.stream = launch.stream();
  run_select(kOp, params, device);
}

void select_attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const std::vector<Tensor>& plan,
                   const Tensor& partial_o, const Tensor& partial_lse, const Tensor& out,
                   const std::optional<Tensor>& lse, int64_t rows_per_tile, double sm_scale, double logits_soft_cap,
                   const std::string& variant, bool free_cuts, const Tensor& summaries, const Tensor& scores,
                   int64_t max_columns, int64_t summary_kind, int64_t group_reduction, double std_weight,
                   int64_t mass_share, int64_t sink_pages, int64_t recent_pages, int64_t budget_pages,
                   int64_t budget_share, int64_t list_pages, int64_t sparse_begin, const std::optional<Tensor>& k,
                   const std::optional<Tensor>& v, const std::optional<Tensor>& slots, bool early) {
  constexpr const char* kOp = "select_attend";
  constexpr bool kCausal = true, kDecode = true;
  AttendWork work = describe_attend(kOp, {q, k_cache, v_cache, partial_o, partial_lse, out, lse}, plan, rows_per_tile,
                                    sm_scale, kCausal, -1, logits_soft_cap, kDecode, variant);
  const SparseRows sparse = sparse_rows(sink_pages, recent_pages, budget_pages, budget_share, list_pages, sparse_begin);
  SelectAttendParams params{
      .select = describe_select(kOp, q, k_cache, plan, summaries, scores, max_columns, summary_kind, group_reduction,
                                std_weight, sm_scale, mass_share, sparse),
      .attend = work.params,
      .early = early};
  require(k.has_value() == v.has_value() && k.has_value() == slots.has_value(), kOp,
          "k, v, slots: expected all of them (new tokens to be stored) or none, got some; pass the three");
  StoreParams store{};
  if (k) {
    store = describe_store(kOp, *k, *v, *slots, k_cache, v_cache, params.select.pages);
    require_one_each(kOp, describe(kOp, "k", *k), params.select.pages.batch);
    params.tokens = store.tokens;
  }
  if (work.params.num_tokens == 0) return;
  const Launch launch(work.device);
  params.select.pages.stream = params.attend.stream = store.pages.stream = launch.stream();
  params.attend.free_cuts = free_cuts;
  if (work.kernel.selects != nullptr && work.kernel.selects(params)) {
    return run(kOp, variant.c_str(), work.kernel.select_and_run, params);
  }
  if (k) run_store(kOp, store, work.device);
  run_select(kOp, params.select, work.device);
  work.params = params.attend;
  // With top-p select writes tiles, too, and attention must not begin before it ends.
  work.params.lists_begin = has_top_p(params.select) ? 0 : sparse.begin;
  run_attend(kOp, work);
}

}  // namespace flashcore
