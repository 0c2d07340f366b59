// Arithmetic that host and device share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLASHCORE_HD __host__ __device__ inline
#else
#define FLASHCORE_HD inline
#endif

namespace flashcore {

constexpr float kLog2E = 1.4426950408889634f;  // log2(e)

FLASHCORE_HD int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// A divisor that the host knows, as a multiplication (Granlund and Montgomery, PLDI 1994): a division is 25 dependent
// instructions, and dependent instructions are what planning and small decode steps take their time for. Exact for
// 0 <= n < 2^31.
struct Divisor {
  int32_t value, shift;
  uint32_t factor;

  explicit Divisor(int32_t divisor) : value(divisor), shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  FLASHCORE_HD friend int32_t operator/(int32_t n, const Divisor& d) {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.factor >> d.shift);
  }
  FLASHCORE_HD friend int32_t operator%(int32_t n, const Divisor& d) { return n - n / d * d.value; }
};
FLASHCORE_HD int32_t ceil_div(int32_t a, const Divisor& b) { return (a + b.value - 1) / b; }

}  // namespace flashcore
