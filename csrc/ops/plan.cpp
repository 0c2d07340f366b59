// From SGLang's slots to pages, and from pages to work.
#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace flashcore {

void page_table(const Tensor& req_to_token, const Tensor& req_pool_indices, const Tensor& seq_lens, int64_t page_size,
                const Tensor& kv_indptr, const Tensor& kv_indices, const Tensor& last_page_len) {
  constexpr const char* kOp = "page_table";
  const TensorArg slots = describe(kOp, "req_to_token", req_to_token);
  const int device = slots.device;
  require_shape(slots, {kAnySize, kAnySize}, "(requests, context)");
  require_scalar(slots, {Scalar::int32});
  require_unit_last_stride(slots);
  require(page_size > 0, kOp, "page_size: expected at least 1, got ", page_size, "; pass the page size of the KV pool");
  const TensorArg pool = describe(kOp, "req_pool_indices", req_pool_indices);
  const int64_t batch = pool.numel();
  require_buffer(pool, 0, device, Scalar::int64);
  const TensorArg lens = describe(kOp, "seq_lens", seq_lens);
  require_buffer(lens, 0, device, Scalar::int64);
  require_shape(lens, {batch}, "(requests)");
  const TensorArg indptr = describe_ints(kOp, "kv_indptr", kv_indptr, batch + 1, device);
  const TensorArg indices = describe_ints(kOp, "kv_indices", kv_indices, 0, device);
  const TensorArg last = describe_ints(kOp, "last_page_len", last_page_len, batch, device);

  const Launch launch(device);
  const PageTableParams params{
      .req_to_token = slots.as<int32_t>(),
      .req_pool_indices = pool.as<int64_t>(),
      .seq_lens = lens.as<int64_t>(),
      .kv_indptr = indptr.as<int32_t>(),
      .kv_indices = indices.as<int32_t>(),
      .last_page_len = last.as<int32_t>(),
      .req_to_token_stride = slots.strides[0],
      .batch = static_cast<int32_t>(batch),
      .page_size = static_cast<int32_t>(page_size),
      .max_pages = static_cast<int32_t>(indices.numel()),
      .stream = launch.stream(),
  };
  run(kOp, kOp, device == kCpu ? run_page_table_cpu : run_page_table_cuda, params);
}

void plan(const std::vector<Tensor>& plan, const Tensor& scratch, int64_t num_tokens, int64_t num_kv_heads,
          int64_t group, int64_t page_size, int64_t num_pages, int64_t rows_per_tile, int64_t max_partials, bool causal,
          int64_t window_left, int64_t policy, int64_t sink_pages, int64_t recent_pages, int64_t budget_pages,
          int64_t budget_share, int64_t list_pages, int64_t sparse_begin, bool share, int64_t pack_keys,
          int64_t split_keys, bool beside) {
  constexpr const char* kOp = "plan";
  const TensorArg work = describe(kOp, "scratch", scratch);
  const int device = work.device;
  require_buffer(work, 0, device);
  require(num_kv_heads > 0 && group > 0, kOp, "heads: expected at least one KV head and one query head of it, got ",
          num_kv_heads, " and ", group, "; pass the model's heads on this rank");
  require(rows_per_tile >= group, kOp, "rows_per_tile: expected at least the group of ", group, " query heads, got ",
          rows_per_tile, "; a tile holds whole tokens");
  require(page_size > 0, kOp, "page_size: expected at least 1, got ", page_size, "; pass the page size of the KV pool");
  require(policy >= 0 && policy <= static_cast<int64_t>(Policy::topk), kOp,
          "policy: expected 0 (exact), 1 (window) or 2 (topk), got ", policy, "; see planner.plan.Policy");
  require(split_keys >= 0 && split_keys % kSplitUnit == 0, kOp, "split_keys: expected a multiple of ", kSplitUnit,
          ", got ", split_keys, "; use 0 for balanced tiles");
  const auto [buffers, batch] = describe_plan(kOp, plan, device, num_tokens, num_kv_heads, rows_per_tile, max_partials);

  const Launch launch(device);
  const PlanParams params{
      .plan = buffers,
      .scratch = work.as<int32_t>(),
      .scratch_size = work.numel(),
      .batch = batch,
      .num_tokens = static_cast<int32_t>(num_tokens),
      .num_kv_heads = static_cast<int32_t>(num_kv_heads),
      .group = static_cast<int32_t>(group),
      .page_size = static_cast<int32_t>(page_size),
      .num_pages = static_cast<int32_t>(num_pages),
      .causal = causal,
      .window_left = static_cast<int32_t>(window_left),
      .policy = static_cast<Policy>(policy),
      .sparse = sparse_rows(sink_pages, recent_pages, budget_pages, budget_share, list_pages, sparse_begin),
      .share = share,
      .pack_keys = static_cast<int32_t>(pack_keys),
      .split_keys = static_cast<int32_t>(split_keys),
      .beside = beside,
      .stream = launch.stream(),
  };
  run(kOp, kOp, device == kCpu ? run_plan_cpu : run_plan_cuda, params);
}

}  // namespace flashcore
