// Merge for decode steps, where latency counts; run_merge_cuda goes here when it can.
#pragma once

#include "params.h"

namespace flashcore {

bool can_merge_decode(const AttendParams&);
int run_merge_decode_cuda(const AttendParams&);  // 0 or a cudaError_t

}  // namespace flashcore
