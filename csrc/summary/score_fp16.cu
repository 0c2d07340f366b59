#include "summary/score.cuh"

namespace flashcore {

cudaError_t launch_score_fp16(const SelectParams& p) {
  return p.pages.summaries.fp8 ? score::dispatch<__half, Fp8>(p) : score::dispatch<__half, __half>(p);
}

}  // namespace flashcore
