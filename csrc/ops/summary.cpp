// Page summaries, and the pages of a budget that they choose.
#include <algorithm>

#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace flashcore {

void summarize(const Tensor& k_cache, const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len,
               const std::optional<Tensor>& first_page, int64_t max_columns, const Tensor& summaries_tensor) {
  constexpr const char* kOp = "summarize";
  const TensorArg k = describe(kOp, "k_cache", k_cache);
  const int device = k.device;
  require_float(k);
  require_cache(k, k, kAnySize);
  const TensorArg last = describe(kOp, "last_page_len", last_page_len);
  require_buffer(last, 0, device);
  const int64_t batch = last.numel();
  const TensorArg indptr = describe_ints(kOp, "kv_indptr", kv_indptr, batch + 1, device);
  const TensorArg indices = describe_ints(kOp, "kv_indices", kv_indices, 0, device);
  const int32_t* first =
      first_page ? describe_ints(kOp, "first_page", *first_page, batch, device).as<int32_t>() : nullptr;
  const TensorArg summaries = describe(kOp, "summaries", summaries_tensor);
  require_shape(summaries, {kAnySize, 2, k.size(2), k.size(3)}, "(pages, mean and deviation, kv_heads, head_dim)");
  require_buffer(summaries, 0, device, k.scalar);

  const Launch launch(device);
  const SummarizeParams params{
      .k = k.data,
      .kv_indptr = indptr.as<int32_t>(),
      .kv_indices = indices.as<int32_t>(),
      .last_page_len = last.as<int32_t>(),
      .first_page = first,
      .summaries = summaries.data,
      .k_stride_page = k.strides[0],
      .k_stride_token = k.strides[1],
      .k_stride_head = k.strides[2],
      .batch = static_cast<int32_t>(batch),
      .max_columns = static_cast<int32_t>(max_columns),
      .num_kv_heads = static_cast<int32_t>(k.size(2)),
      .head_dim = static_cast<int32_t>(k.size(3)),
      .page_size = static_cast<int32_t>(k.size(1)),
      .num_pages = static_cast<int32_t>(std::min(k.size(0), summaries.size(0))),
      .dtype = static_cast<DType>(k.scalar),
      .stream = launch.stream(),
  };
  run(kOp, kOp, device == kCpu ? run_summarize_cpu : run_summarize_cuda, params);
}

void select(const Tensor& q_tensor, const Tensor& summaries_tensor, const std::vector<Tensor>& plan,
            const Tensor& scores_tensor, int64_t page_size, int64_t max_columns, int64_t sink_pages,
            int64_t recent_pages, int64_t budget_pages, int64_t sparse_begin, double std_weight) {
  constexpr const char* kOp = "select";
  const TensorArg q = describe(kOp, "q", q_tensor);
  const int device = q.device;
  require_q(q);
  const TensorArg summaries = describe(kOp, "summaries", summaries_tensor);
  require_shape(summaries, {kAnySize, 2, kAnySize, q.size(2)}, "(pages, mean and deviation, kv_heads, head_dim)");
  require_buffer(summaries, 0, device, q.scalar);
  const int64_t num_kv_heads = summaries.size(2);
  const int32_t group = require_group(kOp, q.size(1), num_kv_heads);
  const TensorArg scores = describe(kOp, "scores", scores_tensor);
  require_buffer(scores, q.size(0) * num_kv_heads * max_columns, device, Scalar::fp32);
  const auto [buffers, batch] = describe_plan(kOp, plan, device, q.size(0), num_kv_heads, group, 0);
  require(batch == q.size(0), kOp, "q: expected one query token for each of ", batch, " requests, got ", q.size(0),
          "; pages are selected for decode batches only");
  if (batch == 0) return;

  const Launch launch(device);
  const SelectParams params{
      .plan = buffers,
      .q = q.data,
      .summaries = summaries.data,
      .scores = scores.as<float>(),
      .q_stride_token = q.strides[0],
      .q_stride_head = q.strides[1],
      .std_weight = static_cast<float>(std_weight),
      .batch = batch,
      .max_columns = static_cast<int32_t>(max_columns),
      .num_qo_heads = static_cast<int32_t>(q.size(1)),
      .num_kv_heads = static_cast<int32_t>(num_kv_heads),
      .head_dim = static_cast<int32_t>(q.size(2)),
      .page_size = static_cast<int32_t>(page_size),
      .sink_pages = static_cast<int32_t>(sink_pages),
      .recent_pages = static_cast<int32_t>(recent_pages),
      .budget_pages = static_cast<int32_t>(budget_pages),
      .sparse_begin = static_cast<int32_t>(sparse_begin),
      .dtype = static_cast<DType>(q.scalar),
      .stream = launch.stream(),
  };
  run(kOp, kOp, device == kCpu ? run_select_cpu : run_select_cuda, params);
}

}  // namespace flashcore
