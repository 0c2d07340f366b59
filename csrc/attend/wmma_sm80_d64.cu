// wmma_sm80 for head size 64.
#include "attend/wmma_sm80.cuh"

namespace flashcore::wmma_sm80 {

template int run<64>(const AttendParams&);

}  // namespace flashcore::wmma_sm80
