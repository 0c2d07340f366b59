// torch.ops.flashcore: schemas, checks and dispatch; the only file that knows torch.
//
// Every op fills buffers that the caller owns. None but cublaslt_plan allocates or waits for the device, so all others
// can be captured in a CUDA graph. Built on libtorch's stable ABI: one library for every torch from
// TORCH_TARGET_VERSION on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "attend/cublaslt.h"
#include "check.h"
#include "params.h"

#ifdef FLASHCORE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

// Weak, because a CPU-only torch does not have it and the library has to load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace flashcore {

// Weak, so that a kernel which was left out of the build is a null pointer: a CPU-only build is this same file, and
// what was built can be listed.
#define FLASHCORE_WEAK(name, Params) extern "C++" int name(const Params&) __attribute__((weak))
FLASHCORE_WEAK(run_page_table_cuda, PageTableParams);
FLASHCORE_WEAK(run_page_table_cpu, PageTableParams);
FLASHCORE_WEAK(run_plan_cuda, PlanParams);
FLASHCORE_WEAK(run_plan_cpu, PlanParams);
FLASHCORE_WEAK(run_summarize_cuda, SummarizeParams);
FLASHCORE_WEAK(run_summarize_cpu, SummarizeParams);
FLASHCORE_WEAK(run_select_cuda, SelectParams);
FLASHCORE_WEAK(run_select_cpu, SelectParams);
FLASHCORE_WEAK(run_attend_wmma_sm80, AttendParams);
FLASHCORE_WEAK(run_attend_wgmma_sm90_decode, AttendParams);
FLASHCORE_WEAK(run_attend_wgmma_sm90_prefill, AttendParams);
FLASHCORE_WEAK(run_attend_cublaslt, AttendParams);
FLASHCORE_WEAK(run_attend_cpu, AttendParams);
FLASHCORE_WEAK(run_merge_cuda, AttendParams);
FLASHCORE_WEAK(run_merge_cpu, AttendParams);
#undef FLASHCORE_WEAK
const char* cublaslt_missing() __attribute__((weak));
int64_t cublaslt_version() __attribute__((weak));
int64_t cublaslt_workspace_bytes(const CublasLtShape&, int64_t) __attribute__((weak));
std::string plan_cublaslt(CublasLtShape, void*, int64_t, int64_t, const std::string&, void*) __attribute__((weak));

namespace {

using torch::stable::Tensor;

template <class Params>
using Run = int (*)(const Params&);

// ---------------------------------------------------------------------------------------------------------------------
// Variants of attend
// ---------------------------------------------------------------------------------------------------------------------

struct Variant {
  const char* name;
  bool cuda;
  Run<AttendParams> decode;
  Run<AttendParams> prefill;
  bool merges = true;  // leaves partial results for the merge

  bool built() const { return decode != nullptr || prefill != nullptr; }
  // Why a variant that was built cannot run on this machine, or nullptr.
  const char* missing() const { return prefill == run_attend_cublaslt ? cublaslt_missing() : nullptr; }
  bool available() const { return built() && missing() == nullptr; }
};

const Variant kVariants[] = {
    {"cpu", false, run_attend_cpu, run_attend_cpu},
    {"wmma_sm80", true, run_attend_wmma_sm80, run_attend_wmma_sm80},
    {"wgmma_sm90", true, run_attend_wgmma_sm90_decode, run_attend_wgmma_sm90_prefill},
    {"cublaslt", true, nullptr, run_attend_cublaslt, false},
};

std::string variant_names(bool json) {
  std::string names;
  for (const Variant& variant : kVariants) {
    if (!variant.available()) continue;
    const std::string quote = json ? "\"" : "";
    names += (names.empty() ? "" : ", ") + quote + variant.name + quote;
  }
  return names;
}

// Built, but without what they need at run time: "name": "why", as JSON.
std::string missing_variants() {
  std::string entries;
  for (const Variant& variant : kVariants) {
    if (!variant.built() || variant.missing() == nullptr) continue;
    entries += std::string(entries.empty() ? "" : ", ") + "\"" + variant.name + "\": \"" + variant.missing() + "\"";
  }
  return entries;
}

// What computes a phase; `name` is known and built.
struct Kernel {
  Run<AttendParams> run;
  bool merges;
};

Kernel find_variant(const std::string& name, bool cuda, bool decode) {
  for (const Variant& variant : kVariants) {
    if (name != variant.name) continue;
    require(variant.cuda == cuda, "attend", "variant: expected one for ", cuda ? "CUDA" : "CPU", " tensors, got '",
            name, "'; choose another variant or move the tensors");
    if (!variant.built()) break;
    require(variant.missing() == nullptr, "attend", "variant: '", name, "' ", variant.missing());
    const Run<AttendParams> run = decode ? variant.decode : variant.prefill;
    require(run != nullptr, "attend", "variant: '", name, "' has no kernel for ", decode ? "decode" : "prefill",
            "; choose another variant");
    return {run, variant.merges};
  }
  fail("attend", "variant: expected one of ", variant_names(false), ", got '", name,
       "'; choose one that this library was built with");
}

// ---------------------------------------------------------------------------------------------------------------------
// Between torch and the plain structs
// ---------------------------------------------------------------------------------------------------------------------

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
    default:
      return Scalar::other;
  }
}

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

int64_t element_size(Scalar scalar) { return scalar == Scalar::fp32 ? 4 : 2; }

void require_float(const TensorArg& arg) {
  if (arg.device == kCpu) {
    require_scalar(arg, {Scalar::bf16, Scalar::fp16, Scalar::fp32});
  } else {
    require_scalar(arg, {Scalar::bf16, Scalar::fp16});
  }
}

void require_cache(const TensorArg& arg, const TensorArg& like, int64_t head_dim) {
  require_shape(arg, {kAnySize, kAnySize, kAnySize, head_dim}, "(pages, page_size, kv_heads, head_dim)");
  require_scalar(arg, {like.scalar});
  require_device(arg, like.device);
  require_unit_last_stride(arg);
  if (arg.device != kCpu) require_16_byte_rows(arg, element_size(arg.scalar));
}

void require_q(const TensorArg& q) {
  require_shape(q, {kAnySize, kAnySize, kAnySize}, "(tokens, heads, head_dim)");
  require_float(q);
  require_unit_last_stride(q);
  if (q.device != kCpu) require_16_byte_rows(q, element_size(q.scalar));
}

int32_t require_group(const char* op, int64_t num_qo_heads, int64_t num_kv_heads) {
  require(num_kv_heads > 0 && num_qo_heads % num_kv_heads == 0, op,
          "heads: expected the query heads to be a multiple of ", num_kv_heads, " KV heads, got ", num_qo_heads,
          "; pass q and the cache of the same layer");
  return static_cast<int32_t>(num_qo_heads / num_kv_heads);
}

// The buffers of a plan in the order of Plan.tensors() in flashcore_sglang/planner/plan.py.
struct PlanArg {
  Plan plan;
  int32_t batch;
};

PlanArg describe_plan(const char* op, const std::vector<Tensor>& tensors, int device, int64_t num_tokens,
                      int64_t num_kv_heads, int64_t rows_per_tile, int64_t max_partials) {
  require(tensors.size() == 13, op, "plan: expected the 13 tensors of Plan.tensors(), got ", tensors.size(),
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
  const TensorArg tile_indptr =
      describe_ints(op, "plan.tile_indptr", tensors[8], rows.size(0) * num_kv_heads + 1, device);
  const TensorArg cta_indptr = describe_ints(op, "plan.cta_indptr", tensors[9], 2, device);
  const TensorArg merge_indptr = describe_ints(op, "plan.merge_indptr", tensors[10], num_tokens + 1, device);
  const TensorArg merge_rows = describe_ints(op, "plan.merge_rows", tensors[11], 0, device);
  require_shape(merge_rows, {kAnySize, 2}, "(max_merge, row and index)");
  const TensorArg counts = describe_ints(op, "plan.counts", tensors[12], kNumCounts, device);
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
              .tile_indptr = tile_indptr.as<int32_t>(),
              .cta_indptr = cta_indptr.as<int32_t>(),
              .merge_indptr = merge_indptr.as<int32_t>(),
              .merge_rows = merge_rows.as<int32_t>(),
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

// The device of an op's tensors for as long as the op runs, and the stream that torch uses there.
class Launch {
 public:
  explicit Launch(int device) {
    if (device == kCpu) return;
    guard_.emplace(device);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

int num_sms(int device) {
  int count = 0;
#ifdef FLASHCORE_WITH_CUDA
  if (device != kCpu) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
#endif
  (void)device;
  return count;
}

template <class Params>
void run(const char* op, const char* kernel, Run<Params> function, const Params& params) {
  require(function != nullptr, op, "expected a library with the kernel '", kernel,
          "', got one that was built without it; install the CUDA toolkit (nvcc) and build again");
  const int error = function(params);
  if (error == 0) return;
#ifdef FLASHCORE_WITH_CUDA
  const char* text = cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  const char* text = "no CUDA in this build";
#endif
  fail(op, "kernel '", kernel, "' failed with error ", error, " (", text,
       "); run again with CUDA_LAUNCH_BLOCKING=1, and `flashcore doctor`");
}

// ---------------------------------------------------------------------------------------------------------------------
// Ops
// ---------------------------------------------------------------------------------------------------------------------

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
          int64_t sparse_begin, bool share, int64_t split_keys) {
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
      .sink_pages = static_cast<int32_t>(sink_pages),
      .recent_pages = static_cast<int32_t>(recent_pages),
      .budget_pages = static_cast<int32_t>(budget_pages),
      .sparse_begin = static_cast<int32_t>(sparse_begin),
      .share = share,
      .split_keys = static_cast<int32_t>(split_keys),
      .stream = launch.stream(),
  };
  run(kOp, kOp, device == kCpu ? run_plan_cpu : run_plan_cuda, params);
}

void attend(const Tensor& q_tensor, const Tensor& k_cache, const Tensor& v_cache, const std::vector<Tensor>& plan,
            const Tensor& partial_o, const Tensor& partial_lse, const Tensor& out_tensor,
            const std::optional<Tensor>& lse_tensor, int64_t rows_per_tile, double sm_scale, bool causal,
            int64_t window_left, double logits_soft_cap, bool decode, const std::string& variant,
            const std::optional<Tensor>& workspace, int64_t max_qo_len, int64_t max_kv_len) {
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
  const AttendParams params{
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
      .num_sms = num_sms(device),
      .stream = launch.stream(),
  };
  run(kOp, variant.c_str(), kernel.run, params);
  if (kernel.merges) run(kOp, "merge", device == kCpu ? run_merge_cpu : run_merge_cuda, params);
}

CublasLtShape cublaslt_shape(const char* op, int64_t batch, int64_t max_qo_len, int64_t max_kv_len,
                             int64_t num_kv_heads, int64_t group, int64_t head_dim, bool fp16, bool causal) {
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
      .fp32_scores = 0,
  };
}

int64_t cublaslt_workspace(int64_t batch, int64_t max_qo_len, int64_t max_kv_len, int64_t num_kv_heads, int64_t group,
                           int64_t head_dim, bool fp16, bool causal, int64_t matmul_bytes) {
  const CublasLtShape shape =
      cublaslt_shape("cublaslt_workspace", batch, max_qo_len, max_kv_len, num_kv_heads, group, head_dim, fp16, causal);
  return cublaslt_workspace_bytes(shape, matmul_bytes);
}

std::string cublaslt_plan(const Tensor& workspace, int64_t batch, int64_t max_qo_len, int64_t max_kv_len,
                          int64_t num_kv_heads, int64_t group, int64_t head_dim, bool fp16, bool causal,
                          int64_t matmul_bytes, const std::string& known) {
  constexpr const char* kOp = "cublaslt_plan";
  const CublasLtShape shape =
      cublaslt_shape(kOp, batch, max_qo_len, max_kv_len, num_kv_heads, group, head_dim, fp16, causal);
  const TensorArg work = describe(kOp, "workspace", workspace);
  require_contiguous(work);
  const Launch launch(work.device);
  return plan_cublaslt(shape, work.data, work.numel() * static_cast<int64_t>(workspace.element_size()), matmul_bytes,
                       known, launch.stream());
}

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

}  // namespace
}  // namespace flashcore

STABLE_TORCH_LIBRARY(flashcore, m) {
  m.def(
      "page_table(Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, int page_size, "
      "Tensor(a!) kv_indptr, Tensor(b!) kv_indices, Tensor(c!) last_page_len) -> ()");
  m.def(
      "plan(Tensor(a!)[] plan, Tensor(b!) scratch, int num_tokens, int num_kv_heads, int group, int page_size, "
      "int num_pages, int rows_per_tile, int max_partials, bool causal, int window_left, int policy, int sink_pages, "
      "int recent_pages, int budget_pages, int sparse_begin, bool share, int split_keys) -> ()");
  m.def(
      "attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] plan, Tensor(a!) partial_o, Tensor(b!) partial_lse, "
      "Tensor(c!) out, Tensor(d!)? lse, int rows_per_tile, float sm_scale, bool causal, int window_left, "
      "float logits_soft_cap, bool decode, str variant, Tensor(e!)? workspace=None, int max_qo_len=0, "
      "int max_kv_len=0) -> ()");
  m.def(
      "summarize(Tensor k_cache, Tensor kv_indptr, Tensor kv_indices, Tensor last_page_len, Tensor? first_page, "
      "int max_columns, Tensor(a!) summaries) -> ()");
  m.def(
      "select(Tensor q, Tensor summaries, Tensor(a!)[] plan, Tensor(b!) scores, int page_size, int max_columns, "
      "int sink_pages, int recent_pages, int budget_pages, int sparse_begin, float std_weight) -> ()");
  m.def(
      "cublaslt_workspace(int batch, int max_qo_len, int max_kv_len, int num_kv_heads, int group, int head_dim, "
      "bool fp16, bool causal, int matmul_bytes) -> int");
  m.def(
      "cublaslt_plan(Tensor(a!) workspace, int batch, int max_qo_len, int max_kv_len, int num_kv_heads, int group, "
      "int head_dim, bool fp16, bool causal, int matmul_bytes, str known) -> str");
  m.def("build_info() -> str");
}

#define FLASHCORE_REGISTER(key)                              \
  STABLE_TORCH_LIBRARY_IMPL(flashcore, key, m) {             \
    m.impl("page_table", TORCH_BOX(&flashcore::page_table)); \
    m.impl("plan", TORCH_BOX(&flashcore::plan));             \
    m.impl("attend", TORCH_BOX(&flashcore::attend));         \
    m.impl("summarize", TORCH_BOX(&flashcore::summarize));   \
    m.impl("select", TORCH_BOX(&flashcore::select));         \
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
