// What every part begins with: functions for host and device, the three dtypes as C++ types, integer helpers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dvit_kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DVIT_INLINE __host__ __device__ inline
#else
#define DVIT_INLINE inline
#endif

// rows.cpp is compiled once for each level of the processor. What it inlines must not be merged with code of another
// level by the linker, so all of it is in a namespace of the level's name.
#ifndef DVIT_LEVEL
#define DVIT_LEVEL portable
#endif

static_assert(sizeof(size_t) == 8, "sizes of workspaces are computed in 64 bits");

namespace dvit {
inline namespace DVIT_LEVEL {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
DVIT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Int>
DVIT_INLINE Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <class Int>
DVIT_INLINE Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

template <class T>
DVIT_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

DVIT_INLINE float to_float(float x) { return x; }

DVIT_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

DVIT_INLINE float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(x));
#else
  constexpr uint32_t rebias = 112u << 23;  // exponents are 112 apart
  const uint32_t shifted = (x.bits & 0x7fffu) << 13;
  const float subnormal = bit_cast<float>(shifted + rebias + (1u << 23)) - bit_cast<float>(rebias + (1u << 23));
  const uint32_t normal = shifted + rebias + (shifted >= 0x7c00u << 13 ? rebias : 0);  // the latter: infinity, NaN
  const uint32_t bits = shifted < 0x0400u << 13 ? bit_cast<uint32_t>(subnormal) : normal;
  return bit_cast<float>(bits | (x.bits & 0x8000u) << 16);
#endif
}

// To the nearest, of two as near to the even one.
template <class T>
DVIT_INLINE T from_float(float x);

template <>
DVIT_INLINE float from_float<float>(float x) {
  return x;
}

template <>
DVIT_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

template <>
DVIT_INLINE Float16 from_float<Float16>(float x) {
#ifdef __CUDA_ARCH__
  return bit_cast<Float16>(__float2half_rn(x));
#else
  const uint32_t all = bit_cast<uint32_t>(x), sign = all >> 16 & 0x8000u, bits = all & 0x7fffffffu;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;  // 0.5's last bit is 2^-24
  uint32_t result = bits < 0x38800000u ? subnormal : normal;
  result = bits >= 0x47800000u ? 0x7c00u : result;
  result = bits > 0x7f800000u ? 0x7e00u : result;
  return Float16{static_cast<uint16_t>(result | sign)};
#endif
}

DVIT_INLINE int64_t size_of(int32_t dtype) { return dtype == DVIT_FLOAT32 ? 4 : 2; }

}  // namespace DVIT_LEVEL
}  // namespace dvit
