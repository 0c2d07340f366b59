// Attention over a plan: the variant, then the merge of what it left in parts.
#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"
#include "ops/work.h"

namespace flashcore {

AttendWork describe_attend(const char* op, const AttendTensors& tensors, const std::vector<Tensor>& plan,
                           int64_t rows_per_tile, double sm_scale, bool causal, int64_t window_left,
                           double logits_soft_cap, bool decode, const std::string& variant) {
  const TensorArg q = describe(op, "q", tensors.q);
  const int device = q.device;
  require_q(q);
  const int64_t num_tokens = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(2);
  require(head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256, op,
          "q: expected a head_dim of 64, 96, 128 or 256, got ", head_dim, "; use another attention backend");
  const TensorArg k = describe(op, "k_cache", tensors.k_cache);
  require_cache(k, q, head_dim);
  const TensorArg v = describe(op, "v_cache", tensors.v_cache);
  require_cache(v, q, head_dim);
  require_shape(v, {k.size(0), k.size(1), k.size(2), head_dim}, "(as k_cache)");
  const int64_t num_kv_heads = k.size(2);
  const int32_t group = require_group(op, num_qo_heads, num_kv_heads);
  require(rows_per_tile >= group, op, "rows_per_tile: expected at least the group of ", group, " query heads, got ",
          rows_per_tile, "; pass what the plan was made with");
  require(logits_soft_cap >= 0, op, "logits_soft_cap: expected 0 (off) or more, got ", logits_soft_cap, "; pass 0");

  const TensorArg out = describe(op, "out", tensors.out);
  require_shape(out, {num_tokens, num_qo_heads, head_dim}, "(as q)");
  require_scalar(out, {q.scalar});
  require_device(out, device);
  require_contiguous(out);
  float* lse_data = nullptr;
  if (tensors.lse) {
    const TensorArg lse = describe(op, "lse", *tensors.lse);
    require_shape(lse, {num_tokens, num_qo_heads}, "(tokens, heads)");
    require_buffer(lse, 0, device, Scalar::fp32);
    lse_data = lse.as<float>();
  }
  const TensorArg partials = describe(op, "partial_o", tensors.partial_o);
  require_buffer(partials, 0, device, Scalar::fp32);
  require_shape(partials, {kAnySize, head_dim}, "(max_partials, head_dim)");
  const TensorArg partial_lses = describe(op, "partial_lse", tensors.partial_lse);
  require_buffer(partial_lses, partials.size(0), device, Scalar::fp32);

  const auto [buffers, batch] =
      describe_plan(op, plan, device, num_tokens, num_kv_heads, rows_per_tile, partials.size(0));
  return {.params =
              {
                  .plan = buffers,
                  .q = q.data,
                  .k = k.data,
                  .v = v.data,
                  .out = out.data,
                  .lse = lse_data,
                  .partial_o = partials.as<float>(),
                  .partial_lse = partial_lses.as<float>(),
                  .q_stride_token = q.strides[0],
                  .q_stride_head = q.strides[1],
                  .k_stride_page = k.strides[0],
                  .k_stride_token = k.strides[1],
                  .k_stride_head = k.strides[2],
                  .v_stride_page = v.strides[0],
                  .v_stride_token = v.strides[1],
                  .v_stride_head = v.strides[2],
                  .batch = batch,
                  .num_tokens = static_cast<int32_t>(num_tokens),
                  .num_qo_heads = static_cast<int32_t>(num_qo_heads),
                  .num_kv_heads = static_cast<int32_t>(num_kv_heads),
                  .head_dim = static_cast<int32_t>(head_dim),
                  .page_size = static_cast<int32_t>(k.size(1)),
                  .num_pages = static_cast<int32_t>(k.size(0)),
                  .sm_scale = static_cast<float>(sm_scale),
                  .logits_soft_cap = static_cast<float>(logits_soft_cap),
                  .causal = causal,
                  .window_left = static_cast<int32_t>(window_left),
                  .dtype = static_cast<DType>(q.scalar),
                  .decode = decode,
                  .num_sms = num_sms(device),
              },
          .kernel = find_variant(variant, device != kCpu, decode),
          .variant = variant,
          .device = device};
}

void run_attend(const char* op, AttendWork work) {
  run(op, work.variant.c_str(), work.kernel.run, work.params);
  work.params.merges = static_cast<Merges>(work.kernel.merges(work.params));
  if (work.params.plan.max_partials > 0 && work.params.merges != Merges::none) {
    run(op, "merge", work.device == kCpu ? run_merge_cpu : run_merge_cuda, work.params);
  }
}

void attend(const Tensor& q_tensor, const Tensor& k_cache, const Tensor& v_cache, const std::vector<Tensor>& plan,
            const Tensor& partial_o, const Tensor& partial_lse, const Tensor& out_tensor,
            const std::optional<Tensor>& lse_tensor, int64_t rows_per_tile, double sm_scale, bool causal,
            int64_t window_left, double logits_soft_cap, bool decode, const std::string& variant,
            const std::optional<Tensor>& workspace, int64_t max_qo_len, int64_t max_kv_len, bool fp32_scores,
            bool free_cuts) {
  constexpr const char* kOp = "attend";
  AttendWork work =
      describe_attend(kOp, {q_tensor, k_cache, v_cache, partial_o, partial_lse, out_tensor, lse_tensor}, plan,
                      rows_per_tile, sm_scale, causal, window_left, logits_soft_cap, decode, variant);
  AttendParams& params = work.params;
  if (workspace) {
    const TensorArg room = describe(kOp, "workspace", *workspace);
    require_device(room, work.device);
    require_contiguous(room);
    params.workspace = room.data;
    params.workspace_bytes = room.numel() * static_cast<int64_t>(workspace->element_size());
  }
  if (params.num_tokens == 0) return;
  params.max_qo_len = static_cast<int32_t>(max_qo_len);
  params.max_kv_len = static_cast<int32_t>(max_kv_len);
  params.fp32_scores = fp32_scores;
  params.free_cuts = free_cuts;
  const Launch launch(work.device);
  params.stream = launch.stream();
  run_attend(kOp, work);
}

}  // namespace flashcore
