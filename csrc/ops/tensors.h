// Between torch and the plain structs: what an op is given, checked and described, and where its kernels run.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"
#include "ops/variants.h"
#include "params.h"

namespace flashcore {

using torch::stable::Tensor;

TensorArg describe(const char* op, const char* name, const Tensor& tensor);

// An int32 buffer with room for `count` entries.
TensorArg describe_ints(const char* op, const char* name, const Tensor& tensor, int64_t count, int device);

// The buffers of a plan in the order of Plan.tensors() in flashcore_sglang/planner/plan.py.
struct PlanArg {
  Plan plan;
  int32_t batch;
};

PlanArg describe_plan(const char* op, const std::vector<Tensor>& tensors, int device, int64_t num_tokens,
                      int64_t num_kv_heads, int64_t rows_per_tile, int64_t max_partials);

// What an op takes as six numbers.
SparseRows sparse_rows(int64_t sink_pages, int64_t recent_pages, int64_t budget_pages, int64_t budget_share,
                       int64_t list_pages, int64_t begin);

// The device of an op's tensors for as long as the op runs, and the stream that torch uses there.
class Launch {
 public:
  explicit Launch(int device);
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// 0 on the CPU.
int num_sms(int device);

// Raises for the error that a kernel returned.
void require_success(const char* op, const char* kernel, int error);

template <class Params>
void run(const char* op, const char* kernel, Run<Params> function, const Params& params) {
  require(function != nullptr, op, "expected a library with the kernel '", kernel,
          "', got one that was built without it; install the CUDA toolkit (nvcc) and build again");
  require_success(op, kernel, function(params));
}

}  // namespace flashcore
