#include "summary/score.cuh"

namespace flashcore {

cudaError_t launch_score_bf16(const SelectParams& p) {
  return p.pages.summaries.fp8 ? score::dispatch<__nv_bfloat16, Fp8>(p)
                               : score::dispatch<__nv_bfloat16, __nv_bfloat16>(p);
}

}  // namespace flashcore
