// 16-bit floats and e4m3 to float, and float to e4m3; the other ways are attend/element_cpu.h.
#pragma once

#include "attend/element_cpu.h"
#include "params.h"

namespace flashcore {

struct Fp8 {  // e4m3 without infinities, largest value 448
  uint8_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  // Exponents of halves end at 2^15: a factor of 2^112 moves them to where a float has them, subnormals included.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  return float_of(sign | (magnitude >= 0x7c00 ? 0x7f800000u | magnitude << 13 : bits_of(scaled)));
}
inline float to_float(Fp8 value) {
  const uint32_t sign = (value.bits & 0x80u) << 24, magnitude = value.bits & 0x7fu;
  return float_of(sign | (magnitude == 0x7f ? 0x7fc00000u : bits_of(float_of(magnitude << 20) * 0x1p120f)));
}

// What is too large becomes the largest value.
template <>
inline Fp8 from_float<Fp8>(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
  uint32_t eighth;
  if (magnitude > 0x7f800000) {
    eighth = 0x7f;  // NaN
  } else if (magnitude >= bits_of(448.0f)) {
    eighth = 0x7e;
  } else if (magnitude < bits_of(0x1p-6f)) {
    // There the values are multiples of 2^-9, which is the last bit of a float near 2^14.
    eighth = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  } else {
    eighth = (magnitude - (120u << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  }
  return {static_cast<uint8_t>(sign | eighth)};
}

// Calls f(T{}, S{}) with the element types of the keys and of their summaries.
template <class F>
void with_elements(const SummarizeParams& p, F f) {
  const auto of_keys = [&](auto element) { return p.summaries.fp8 ? f(element, Fp8{}) : f(element, element); };
  switch (p.dtype) {
    case DType::bf16:
      return of_keys(Bf16{});
    case DType::fp16:
      return of_keys(Fp16{});
    case DType::fp32:
      return of_keys(float{});
  }
}

}  // namespace flashcore
