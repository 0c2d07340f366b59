// Decode on Hopper: the kernels behind run_attend_wgmma_sm90_decode.
#pragma once

#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode_traits.cuh"
#include "device/dependent_launch.cuh"

namespace flashcore::decode90 {

Params make_params(const AttendParams&);

cudaError_t run_many(const Params&);            // any plan; where packed rows are apart, with run_packed
cudaError_t run_packed(const Params&);          // packed rows, behind what leaves them SMs
cudaError_t run_few(const Params&);             // at most kFewQueries packed queries in all, or a request
cudaError_t run_cluster(const Params&);         // few requests, merged: nothing is left for the merge
cudaError_t run_either(const Params&);          // any number: run_many where pages are shared, else run_few
cudaError_t run_cluster_or_few(const Params&);  // run_few and its merge where pages are shared, else run_cluster

// run_cluster that records `begun`: all its CTAs have asked for their first keys, or left, since pages are shared.
cudaError_t begin_cluster(const Params&, cudaEvent_t begun);

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

// Whether packed rows, if there are any, have a kernel of their own. Behind select, where there are few of them and the
// smaller kernel mostly does the work, from twice as many requests on.
static_assert(kMostApart <= kShortQueries);
inline bool are_apart(const Params& params) {
  const AttendParams& p = params.attend;
  const int32_t requests = p.lists_begin > 0 ? p.batch / 2 : p.batch;
  return p.plan.may_pack() && packs_apart(requests, p.num_kv_heads, params.group);
}

// Launches a kernel of a step on its stream, or before the one in front of it ends (params.dependent).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_in_step(const Params& params, void (*kernel)(Parameters...), int ctas, int threads, int shared_bytes,
                           const Arguments&... arguments) {
  const auto stream = static_cast<cudaStream_t>(params.attend.stream);
  if (params.dependent) {
    return launch_dependent_shared(kernel, ctas, threads, shared_bytes, stream, arguments...);
  }
  kernel<<<ctas, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

bool fits_cluster(const Params&);      // whether run_cluster can run it, here, if the plan shares nothing
bool fits_packed_rows(const Params&);  // and if it does, or it cannot

}  // namespace flashcore::decode90
