// wmma_sm80 for head size 96.
#include "attend/wmma_sm80.cuh"

namespace flashcore::wmma_sm80 {

template int run<96>(const AttendParams&);

}  // namespace flashcore::wmma_sm80
