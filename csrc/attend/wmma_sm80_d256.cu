// wmma_sm80 for head size 256.
#include "attend/wmma_sm80.cuh"

namespace flashcore::wmma_sm80 {

template int run<256>(const AttendParams&);

}  // namespace flashcore::wmma_sm80
