// wmma_sm80: picks the head size. The kernel is in wmma_sm80.cuh, compiled once a head size so that each takes seconds.
#include <cuda_runtime.h>

#include "params.h"

namespace flashcore {
namespace wmma_sm80 {

template <int kHeadDim>
int run(const AttendParams&);

}  // namespace wmma_sm80

int run_attend_wmma_sm80(const AttendParams& p) {
  switch (p.head_dim) {
    case 64:
      return wmma_sm80::run<64>(p);
    case 96:
      return wmma_sm80::run<96>(p);
    case 128:
      return wmma_sm80::run<128>(p);
    case 256:
      return wmma_sm80::run<256>(p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashcore
