#include "ops/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef FLASHCORE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

// Weak, because a CPU-only torch does not have it and the library has to load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace flashcore {

namespace {

Scalar scalar_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Scalar::bf16;
    case ScalarType::Half:
      return Scalar::fp16;
    case ScalarType::Float:
      return Scalar::fp32;
    case ScalarType::Int:
      return Scalar::int32;
    case ScalarType::Long:
      return Scalar::int64;
    case ScalarType::Float8_e4m3fn:
      return Scalar::fp8;
    default:
      return Scalar::other;
  }
}

}  // namespace

TensorArg describe(const char* op, const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  return {
      .op = op,
      .name = name,
      .data = tensor.data_ptr(),
      .scalar = scalar_of(tensor),
      .device = tensor.is_cpu() ? kCpu : static_cast<int>(tensor.get_device_index()),
      .sizes = {sizes.data(), sizes.size()},
      .strides = {strides.data(), strides.size()},
  };
}

TensorArg describe_ints(const char* op, const char* name, const Tensor& tensor, int64_t count, int device) {
  const TensorArg arg = describe(op, name, tensor);
  require_buffer(arg, count, device);
  return arg;
}

PlanArg describe_plan(const char* op, const std::vector<Tensor>& tensors, int device, int64_t num_tokens,
                      int64_t num_kv_heads, int64_t rows_per_tile, int64_t max_partials) {
  require(tensors.size() == 14, op, "plan: expected the 14 tensors of Plan.tensors(), got ", tensors.size(),
          "; pass that list");
  const int64_t batch = tensors[0].numel() - 1;
  require(batch >= 0, op, "plan.qo_indptr: expected batch + 1 entries, got none; pass [0] for an empty batch");
  const TensorArg qo_indptr = describe_ints(op, "plan.qo_indptr", tensors[0], batch + 1, device);
  const TensorArg kv_indptr = describe_ints(op, "plan.kv_indptr", tensors[1], batch + 1, device);
  const TensorArg kv_indices = describe_ints(op, "plan.kv_indices", tensors[2], 0, device);
  const TensorArg last_page_len = describe_ints(op, "plan.last_page_len", tensors[3], batch, device);
  const TensorArg positions = describe_ints(op, "plan.positions", tensors[4], num_tokens, device);
  const TensorArg rows = describe_ints(op, "plan.rows", tensors[5], 0, device);
  require_shape(rows, {kAnySize, sizeof(Row) / sizeof(int32_t)}, "(max_rows, fields of Row)");
  const TensorArg row_tokens = describe_ints(op, "plan.row_tokens", tensors[6], 0, device);
  const TensorArg tiles = describe_ints(op, "plan.tiles", tensors[7], 0, device);
  require_shape(tiles, {kAnySize, sizeof(Tile) / sizeof(int32_t)}, "(max_tiles, fields of Tile)");
  const TensorArg pair_tiles =
      describe_ints(op, "plan.pair_tiles", tensors[8], 2 * rows.size(0) * num_kv_heads, device);
  require_shape(pair_tiles, {kAnySize, 2}, "(max_rows * num_kv_heads, first tile and end)");
  const TensorArg cta_indptr = describe_ints(op, "plan.cta_indptr", tensors[9], 2, device);
  const TensorArg merge_indptr = describe_ints(op, "plan.merge_indptr", tensors[10], num_tokens + 1, device);
  const TensorArg merge_rows = describe_ints(op, "plan.merge_rows", tensors[11], 0, device);
  require_shape(merge_rows, {kAnySize, 2}, "(max_merge, row and index)");
  const TensorArg stretches = describe_ints(op, "plan.stretches", tensors[12], 0, device);
  require_shape(stretches, {kAnySize, sizeof(Stretch) / sizeof(int32_t)}, "(max_row_tokens, fields of Stretch)");
  require(stretches.size(0) == row_tokens.numel(), op, "plan.stretches: expected as many as plan.row_tokens, ",
          row_tokens.numel(), ", got ", stretches.size(0), "; pass the tensors of one plan");
  const TensorArg counts = describe_ints(op, "plan.counts", tensors[13], kNumCounts, device);
  return {
      .plan =
          {
              .qo_indptr = qo_indptr.as<int32_t>(),
              .kv_indptr = kv_indptr.as<int32_t>(),
              .kv_indices = kv_indices.as<int32_t>(),
              .last_page_len = last_page_len.as<int32_t>(),
              .positions = positions.as<int32_t>(),
              .rows = rows.as<Row>(),
              .row_tokens = row_tokens.as<int32_t>(),
              .tiles = tiles.as<Tile>(),
              .pair_tiles = pair_tiles.as<int32_t>(),
              .cta_indptr = cta_indptr.as<int32_t>(),
              .merge_indptr = merge_indptr.as<int32_t>(),
              .merge_rows = merge_rows.as<int32_t>(),
              .stretches = stretches.as<Stretch>(),
              .counts = counts.as<int32_t>(),
              .num_ctas = static_cast<int32_t>(cta_indptr.numel() - 1),
              .rows_per_tile = static_cast<int32_t>(rows_per_tile),
              .max_pages = static_cast<int32_t>(kv_indices.numel()),
              .max_rows = static_cast<int32_t>(rows.size(0)),
              .max_row_tokens = static_cast<int32_t>(row_tokens.numel()),
              .max_tiles = static_cast<int32_t>(tiles.size(0)),
              .max_merge = static_cast<int32_t>(merge_rows.size(0)),
              .max_partials = static_cast<int32_t>(max_partials),
          },
      .batch = static_cast<int32_t>(batch),
  };
}

SparseRows sparse_rows(int64_t sink_pages, int64_t recent_pages, int64_t budget_pages, int64_t budget_share,
                       int64_t list_pages, int64_t begin) {
  return {.sink_pages = static_cast<int32_t>(sink_pages),
          .recent_pages = static_cast<int32_t>(recent_pages),
          .budget_pages = static_cast<int32_t>(budget_pages),
          .budget_share = static_cast<int32_t>(budget_share),
          .list_pages = static_cast<int32_t>(list_pages),
          .begin = static_cast<int32_t>(begin)};
}

Launch::Launch(int device) {
  if (device == kCpu) return;
  guard_.emplace(device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
}

int num_sms(int device) {
  int count = 0;
#ifdef FLASHCORE_WITH_CUDA
  if (device != kCpu) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
#endif
  (void)device;
  return count;
}

void require_success(const char* op, const char* kernel, int error) {
  if (error == 0) return;
#ifdef FLASHCORE_WITH_CUDA
  const char* text = cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  const char* text = "no CUDA in this build";
#endif
  fail(op, "kernel '", kernel, "' failed with error ", error, " (", text,
       "); run again with CUDA_LAUNCH_BLOCKING=1, and `flashcore doctor`");
}

}  // namespace flashcore
