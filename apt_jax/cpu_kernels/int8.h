// Codes: int8 numbers in -127..127, each times a float32 scale. Four adjacent inputs of one output lie in 32 bits.
//
// They are widened to float32 (or pairs of bfloat16) in registers, or, where rows are codes too, multiplied as they are:
// VNNI adds four products to an int32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace apt {

typedef int32_t Whole __attribute__((vector_size(kLanes * 4)));

constexpr float kLargestCode = 127;
constexpr float kWidened = 1 << 24;  // what `widened` is of a code: this is one instruction less

// Four codes in each 32 bits, the first in the lowest byte.
inline Bits load_codes(const int8_t* at) {
  Bits out;
  std::memcpy(&out, at, sizeof out);
  return out;
}

inline Vector to_floats(Whole x) { return __builtin_convertvector(x, Vector); }

// Code j of each four, times kWidened: its byte alone, as the highest.
template <int j>
inline Vector widened(Bits codes) {
  const Bits highest = j < 3 ? codes << (24 - 8 * j) : codes;
  return to_floats(reinterpret_cast<Whole>(j > 0 ? highest & 0xff000000 : highest));
}

// Codes j and j + 1 of each four as a pair of bfloat16, times kWidened; it has all bits of a code.
template <int j>
inline Bits widened_pair(Bits codes) {
  return reinterpret_cast<Bits>(widened<j>(codes)) >> 16 | reinterpret_cast<Bits>(widened<j + 1>(codes));
}

// The four codes at x in every lane.
inline Bits same(const int8_t* x) {
  uint32_t four;
  std::memcpy(&four, x, sizeof four);
  return Bits{} + four;
}

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
// The instruction takes bytes without a sign for one side, so 128 is added to a kernel's codes, and sums begin with what
// that adds, -128 times the sum of a row's codes.
constexpr int32_t kOffset = 128;

inline Bits as_factors(Bits kernel) { return kernel ^ 0x80808080; }

// sums + for each four codes the sum of their products.
inline Whole add_products(Whole sums, Bits x, Bits kernel) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Whole>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(kernel),
                                                     reinterpret_cast<__m512i>(x)));
#else
  return reinterpret_cast<Whole>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sums), reinterpret_cast<__m256i>(kernel), reinterpret_cast<__m256i>(x)));
#endif
}
#else
constexpr int32_t kOffset = 0;

inline Bits as_factors(Bits kernel) { return kernel; }

template <int j>
inline Whole code(Bits codes) {
  return reinterpret_cast<Whole>(codes << (24 - 8 * j)) >> 24;
}

inline Whole add_products(Whole sums, Bits x, Bits kernel) {
  return sums + code<0>(kernel) * code<0>(x) + code<1>(kernel) * code<1>(x) + code<2>(kernel) * code<2>(x) +
         code<3>(kernel) * code<3>(x);
}
#endif

// Codes of one scale as the numbers that they stand for.
struct Scaled {
  const int8_t* codes;
  float scale;

  Scaled operator+(int i) const { return {codes + i, scale}; }
  float operator[](int i) const { return codes[i] * scale; }
};

// The greatest magnitude of `x [size]`; NaN if there is one.
inline float greatest_magnitude(const float* x, int size) {
  Whole greatest{};  // as bits: without the sign they are in the order of the numbers, and NaN comes last
  const int whole = size / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    Whole bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    greatest = greatest > bits ? greatest : bits;
  }
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; lane++) found = std::max(found, int32_t(greatest[lane]));
  for (int i = whole; i < size; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found = std::max(found, bits & 0x7fffffff);
  }
  float out;
  std::memcpy(&out, &found, sizeof out);
  return out;
}

// The codes of `x [size]`, which are x times `factor`, to nearest.
inline void encode(const float* x, int size, float factor, int8_t* out) {
  constexpr float kRounds = 12582912;  // 1.5 * 2^23: what is added to it becomes a whole number, its lowest bits
  int i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= size; i += kLanes) {
    const Vector shifted = load(x + i) * factor + kRounds;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(shifted)));
  }
#endif
  for (; i < size; i++) {
    const float shifted = x[i] * factor + kRounds;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    out[i] = int8_t(bits);
  }
}

// Codes of `x [size]`, and their scale, as `encode` in apt_jax/attention/int8.py: it is not finite if a number is not.
inline float encode(const float* x, int size, int8_t* out) {
  const float scale = greatest_magnitude(x, size) / kLargestCode;
  if (!(scale > 0) || !std::isfinite(scale)) {
    std::fill_n(out, size, int8_t(0));
    return scale;
  }
  for (int i = 0; i < size; i++) out[i] = int8_t(std::nearbyint(x[i] / scale));
  return scale;
}

// A row's scale, which is not finite if a number is not, and what its numbers are multiplied by to be codes.
struct RowScale {
  float scale, factor;

  explicit RowScale(float greatest)
      : scale(greatest / kLargestCode), factor(scale > 1e-30f && scale < 1e30f ? kLargestCode / greatest : 0) {}
};

}  // namespace apt
