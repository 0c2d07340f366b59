// The `cpu` variant of attend: the CTAs of the plan are dealt to threads; the kernel of attend_cpu.h is compiled for
// each instruction set below and the best one that the machine has is taken.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "attend/element_cpu.h"
#include "attend/threads_cpu.h"
#include "params.h"

namespace flashcore {
namespace {

using AttendCta = void (*)(const AttendParams&, int cta);

constexpr int kBlock = 64;  // keys that are widened at a time: K and V of head_dim 128 take 64 KiB
constexpr float kNoKeys = -std::numeric_limits<float>::infinity();

inline int token_of(const Plan& plan, const Row& row, int index) {
  return row.flags & kPacked ? plan.row_tokens[row.q_begin + index] : row.q_begin + index;
}

#define FLASHCORE_VECTOR_BYTES 16
namespace portable {
#include "attend/attend_cpu.h"
}
#undef FLASHCORE_VECTOR_BYTES

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FLASHCORE_VECTOR_BYTES 32
namespace avx2 {
#include "attend/attend_cpu.h"
}
#undef FLASHCORE_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FLASHCORE_VECTOR_BYTES 64
namespace avx512 {
#include "attend/attend_cpu.h"
}
#undef FLASHCORE_VECTOR_BYTES
#pragma GCC pop_options
#endif

AttendCta choose_kernel(DType dtype, int head_dim) {
#ifdef __x86_64__
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return avx512::attend_cta_of(dtype, head_dim);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::attend_cta_of(dtype, head_dim);
#endif
  return portable::attend_cta_of(dtype, head_dim);
}

}  // namespace

int run_attend_cpu(const AttendParams& params) {
  const AttendCta attend_cta = choose_kernel(params.dtype, params.head_dim);
  parallel_for(params.plan.num_ctas, [&](int cta) { attend_cta(params, cta); });
  return 0;
}

}  // namespace flashcore
