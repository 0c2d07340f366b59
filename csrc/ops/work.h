// An op's arguments, checked and described: what select_attend has in common with attend and select.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensors.h"
#include "ops/variants.h"
#include "params.h"

namespace flashcore {

struct AttendTensors {
  const Tensor &q, &k_cache, &v_cache, &partial_o, &partial_lse, &out;
  const std::optional<Tensor>& lse;
};

struct AttendWork {
  AttendParams params;  // no stream yet, and nothing that only one of the ops is given
  Kernel kernel;
  std::string variant;
  int device;
};

AttendWork describe_attend(const char* op, const AttendTensors& tensors, const std::vector<Tensor>& plan,
                           int64_t rows_per_tile, double sm_scale, bool causal, int64_t window_left,
                           double logits_soft_cap, bool decode, const std::string& variant);

// The kernel, then the merge of what it left in parts.
void run_attend(const char* op, AttendWork work);

}  // namespace flashcore
