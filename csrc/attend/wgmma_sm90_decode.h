// Decode on Hopper: the kernels behind run_attend_wgmma_sm90_decode.
#pragma once

#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode_traits.cuh"

namespace flashcore::decode90 {

Params make_params(const AttendParams&);

cudaError_t run_many(const Params&);            // any plan
cudaError_t run_few(const Params&);             // at most kFewQueries packed queries in all, or a request
cudaError_t run_cluster(const Params&);         // few requests, merged: nothing is left for the merge
cudaError_t run_either(const Params&);          // any number: run_many where pages are shared, else run_few
cudaError_t run_cluster_or_few(const Params&);  // run_few where pages are shared, else run_cluster

// What runs a step, and what that leaves for the merge.
struct Way {
  cudaError_t (*run)(const Params&);
  Merges merges;
};
Way way_of(const Params&);

bool has_short_strides(const AttendParams&);  // what run_few and run_either need of the cache
inline bool are_few(const Params& params) {
  return params.attend.num_tokens * params.group <= kFewQueries && has_short_strides(params.attend);
}

// Decode of requests that have rows of their own only.
inline bool are_alone(const Params& params) {
  const AttendParams& p = params.attend;
  return !p.plan.may_pack() && params.group <= kFewQueries && has_short_strides(p);
}

bool fits_cluster(const Params&);      // whether run_cluster can run it, here, if the plan shares nothing
bool fits_packed_rows(const Params&);  // and if it does, or it cannot

}  // namespace flashcore::decode90
