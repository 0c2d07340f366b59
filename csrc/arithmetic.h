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

}  // namespace flashcore
