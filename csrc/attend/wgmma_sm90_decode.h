// Decode on Hopper: the kernels behind run_attend_wgmma_sm90_decode.
#pragma once

#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode_traits.cuh"

namespace flashcore::decode90 {

Params make_params(const AttendParams&);

cudaError_t run_many(const Params&);    // any plan
cudaError_t run_few(const Params&);     // at most kFewQueries packed queries in all
cudaError_t run_cluster(const Params&);  // as run_few, and merges
cudaError_t run_either(const Params&);  // decode of any number: run_many where pages are shared, else run_few

bool has_short_strides(const AttendParams&);  // what run_few and run_either need of the cache
inline bool are_few(const Params& params) {
  return params.attend.num_tokens * params.group <= kFewQueries && has_short_strides(params.attend);
}

inline bool fits_cluster(const Params& params) {
  const AttendParams& p = params.attend;
  return p.decode && p.num_kv_heads == 8 && p.batch <= 16 && are_few(params);
}

}  // namespace flashcore::decode90
