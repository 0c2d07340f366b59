// Decode on Hopper: the kernels behind run_attend_wgmma_sm90_decode.
#pragma once

#include <cuda_runtime.h>

#include "attend/wgmma_sm90_decode_traits.cuh"

namespace flashcore::decode90 {

Params make_params(const AttendParams&);

cudaError_t run_many(const Params&);  // any plan
bool are_few(const Params&);          // whether there are at most kFewQueries packed queries, and run_few takes them
cudaError_t run_few(const Params&);
cudaError_t run_either(Params);  // decode of any number: run_many where pages are shared, else run_few

}  // namespace flashcore::decode90
