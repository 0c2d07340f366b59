// Attention over a plan: the variant, then the merge of what it left in parts.
#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace flashcore {

void attend(const Tensor& q_tensor, const Tensor& k_cache, const Tensor& v_cache, const std::vector<Tensor>& plan,
            const Tensor& partial_o, const Tensor& partial_lse, const Tensor& out_tensor,
            const std::optional<Tensor>& lse_tensor, int64_t rows_per_tile, double sm_scale, bool causal,
            int64_t window_left, double logits_soft_cap, bool decode, const std::string& variant,
            const std::optional<Tensor>& workspace, int64_t max_qo_len, int64_t max_kv_len, bool fp32_scores,
            int64_t lists_begin, bool free_cuts) {
  constexpr const char* kOp = "attend";
  const TensorArg q = describe(kOp, "q", q_tensor);
  const int device = q.device;
  require_q(q);
  const int64_t num_tokens = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(2);
  require(head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256, kOp,
          "q: expected a head_dim of 64, 96, 128 or 256, got ", head_dim, "; use another attention backend");
  const TensorArg k = describe(kOp, "k_cache", k_cache);
  require_cache(k, q, head_dim);
  const TensorArg v = describe(kOp, "v_cache", v_cache);
  require_cache(v, q, head_dim);
  require_shape(v, {k.size(0), k.size(1), k.size(2), head_dim}, "(as k_cache)");
  const int64_t num_kv_heads = k.size(2);
  const int32_t group = require_group(kOp, num_qo_heads, num_kv_heads);
  require(rows_per_tile >= group, kOp, "rows_per_tile: expected at least the group of ", group, " query heads, got ",
          rows_per_tile, "; pass what the plan was made with");
  require(logits_soft_cap >= 0, kOp, "logits_soft_cap: expected 0 (off) or more, got ", logits_soft_cap, "; pass 0");

  const TensorArg out = describe(kOp, "out", out_tensor);
  require_shape(out, {num_tokens, num_qo_heads, head_dim}, "(as q)");
  require_scalar(out, {q.scalar});
  require_device(out, device);
  require_contiguous(out);
  float* lse_data = nullptr;
  if (lse_tensor) {
    const TensorArg lse = describe(kOp, "lse", *lse_tensor);
    require_shape(lse, {num_tokens, num_qo_heads}, "(tokens, heads)");
    require_buffer(lse, 0, device, Scalar::fp32);
    lse_data = lse.as<float>();
  }
  const TensorArg partials = describe(kOp, "partial_o", partial_o);
  require_buffer(partials, 0, device, Scalar::fp32);
  require_shape(partials, {kAnySize, head_dim}, "(max_partials, head_dim)");
  const TensorArg partial_lses = describe(kOp, "partial_lse", partial_lse);
  require_buffer(partial_lses, partials.size(0), device, Scalar::fp32);

  const auto [buffers, batch] =
      describe_plan(kOp, plan, device, num_tokens, num_kv_heads, rows_per_tile, partials.size(0));
  const Kernel kernel = find_variant(variant, device != kCpu, decode);
  TensorArg work{};
  if (workspace) {
    work = describe(kOp, "workspace", *workspace);
    require_device(work, device);
    require_contiguous(work);
  }
  if (num_tokens == 0) return;

  const Launch launch(device);
  AttendParams params{
      .plan = buffers,
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .out = out.data,
      .lse = lse_data,
      .partial_o = partials.as<float>(),
      .partial_lse = partial_lses.as<float>(),
      .workspace = work.data,
      .workspace_bytes = workspace ? work.numel() * static_cast<int64_t>(workspace->element_size()) : 0,
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
      .max_qo_len = static_cast<int32_t>(max_qo_len),
      .max_kv_len = static_cast<int32_t>(max_kv_len),
      .fp32_scores = fp32_scores,
      .lists_begin = static_cast<int32_t>(lists_begin),
      .free_cuts = free_cuts,
      .num_sms = num_sms(device),
      .stream = launch.stream(),
  };
  run(kOp, variant.c_str(), kernel.run, params);
  params.merges = static_cast<Merges>(kernel.merges(params));
  if (partials.size(0) > 0 && params.merges != Merges::none) {
    run(kOp, "merge", device == kCpu ? run_merge_cpu : run_merge_cuda, params);
  }
}

}  // namespace flashcore
