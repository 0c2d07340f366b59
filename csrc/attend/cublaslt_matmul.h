// Strided-batched products by cuBLASLt, each with the fastest of the algorithms that its heuristic proposes.
//
// libcublasLt is opened at run time: a machine without it loses this variant and nothing else. Errors are exceptions
// that name the call and its cublasStatus.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <string>

#include "params.h"

namespace flashcore {

// Why libcublasLt cannot be used, or nullptr.
const char* cublaslt_missing();
// As cublasLtGetVersion, 0 where it is missing.
int64_t cublaslt_version();

// D = alpha A op(B) + beta D, row-major: A [rows, inner], D [rows, cols], B [inner, cols], or [cols, inner] transposed.
struct MatmulShape {
  bool transpose_b;
  DType input, output;
  int32_t rows, cols, inner, count;

  auto operator<=>(const MatmulShape&) const = default;
  std::string text() const;  // the key in the table of tuned algorithms
};

// Elements from a row to the next and from a matrix of the batch to the next.
struct MatmulArg {
  void* data;
  int64_t row_stride, batch_stride;
};

struct MatmulArgs {
  MatmulArg a, b, d;
  float alpha, beta;
  void* workspace;
  int64_t workspace_bytes;
  void* stream;
};

using Algorithms = std::map<std::string, std::string>;  // MatmulShape::text() -> configuration of the algorithm

// Makes `shape` ready on the current device, with the algorithm that `known` names where the heuristic still proposes
// it. Else with `measure` it times every candidate on `args`, which it overwrites, and waits for the device; without,
// it takes the heuristic's first. Returns the configuration, empty where it was neither known nor measured.
std::string plan_matmul(const MatmulShape& shape, const MatmulArgs& args, const Algorithms& known, bool measure);

// A planned product: neither allocates nor asks the heuristic.
void run_matmul(const MatmulShape& shape, const MatmulArgs& args);

}  // namespace flashcore
