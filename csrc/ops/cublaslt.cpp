// What the cublaslt variant needs before it runs.
#include "ops/kernels.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace flashcore {

namespace {

CublasLtShape cublaslt_shape(const char* op, int64_t batch, int64_t max_qo_len, int64_t max_kv_len,
                             int64_t num_kv_heads, int64_t group, int64_t head_dim, bool fp16, bool causal,
                             bool fp32_scores) {
  require(cublaslt_workspace_bytes != nullptr, op,
          "expected a library with the variant 'cublaslt', got one that was built without it; build where nvcc and "
          "cublasLt.h (pip install nvidia-cublas) are");
  require(batch > 0 && max_qo_len > 0 && max_kv_len >= 0 && num_kv_heads > 0 && group > 0 && head_dim > 0, op,
          "expected a batch with queries, got batch ", batch, ", max_qo_len ", max_qo_len, ", max_kv_len ", max_kv_len,
          ", ", num_kv_heads, " KV heads of ", group, " query heads of ", head_dim, "; plan no empty batch");
  return {
      .batch = static_cast<int32_t>(batch),
      .max_qo_len = static_cast<int32_t>(max_qo_len),
      .max_kv_len = static_cast<int32_t>(max_kv_len),
      .num_kv_heads = static_cast<int32_t>(num_kv_heads),
      .group = static_cast<int32_t>(group),
      .head_dim = static_cast<int32_t>(head_dim),
      .dtype = fp16 ? DType::fp16 : DType::bf16,
      .causal = causal,
      .fp32_scores = fp32_scores,
  };
}

}  // namespace

int64_t cublaslt_workspace(int64_t batch, int64_t max_qo_len, int64_t max_kv_len, int64_t num_kv_heads, int64_t group,
                           int64_t head_dim, bool fp16, bool causal, bool fp32_scores, int64_t matmul_bytes) {
  const CublasLtShape shape = cublaslt_shape("cublaslt_workspace", batch, max_qo_len, max_kv_len, num_kv_heads, group,
                                             head_dim, fp16, causal, fp32_scores);
  return cublaslt_workspace_bytes(shape, matmul_bytes);
}

std::string cublaslt_plan(const Tensor& workspace, int64_t batch, int64_t max_qo_len, int64_t max_kv_len,
                          int64_t num_kv_heads, int64_t group, int64_t head_dim, bool fp16, bool causal,
                          bool fp32_scores, int64_t matmul_bytes, const std::string& known, bool measure) {
  constexpr const char* kOp = "cublaslt_plan";
  const CublasLtShape shape =
      cublaslt_shape(kOp, batch, max_qo_len, max_kv_len, num_kv_heads, group, head_dim, fp16, causal, fp32_scores);
  const TensorArg work = describe(kOp, "workspace", workspace);
  require_contiguous(work);
  const Launch launch(work.device);
  return plan_cublaslt(shape, work.data, work.numel() * static_cast<int64_t>(workspace.element_size()), matmul_bytes,
                       known, measure, launch.stream());
}

}  // namespace flashcore
