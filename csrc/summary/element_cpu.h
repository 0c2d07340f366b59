// 16-bit floats to float; the other way is attend/element_cpu.h.
#pragma once

#include "attend/element_cpu.h"
#include "params.h"

namespace flashcore {

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  // Exponents of halves end at 2^15: a factor of 2^112 moves them to where a float has them, subnormals included.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  return float_of(sign | (magnitude >= 0x7c00 ? 0x7f800000u | magnitude << 13 : bits_of(scaled)));
}

// Calls f(T{}) with the element type T of a dtype.
template <class F>
void with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(Bf16{});
    case DType::fp16:
      return f(Fp16{});
    case DType::fp32:
      return f(float{});
  }
}

}  // namespace flashcore
