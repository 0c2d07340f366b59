// The cublaslt variant of attend: planned on the host from the sizes of a batch's longest requests, then run by
// run_attend_cublaslt (params.h), as often as the sizes hold.
#pragma once

#include <cstdint>
#include <string>

#include "attend/cublaslt_schedule.h"

namespace flashcore {

// Why the variant cannot run on this machine, or nullptr.
const char* cublaslt_missing();
// As cublasLtGetVersion, 0 where the library is missing.
int64_t cublaslt_version();

// Bytes of AttendParams::workspace, `matmul_bytes` for the matmuls of each lane included.
int64_t cublaslt_workspace_bytes(const CublasLtShape& shape, int64_t matmul_bytes);

// Finds an algorithm for every matmul of the shape: that of `known`, else with `measure` the fastest, which overwrites
// the workspace and waits for the device, without it the one that cuBLASLt would take. `known` and the result are lines
// "matmul=algorithm"; the result has what is known or measured.
std::string plan_cublaslt(const CublasLtShape& shape, void* workspace, int64_t workspace_bytes, int64_t matmul_bytes,
                          const std::string& known, bool measure, void* stream);

}  // namespace flashcore
