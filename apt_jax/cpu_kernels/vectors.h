// Vectors of float32 as wide as the machine's registers, and bfloat16 in pairs.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace apt {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

constexpr float kNever = -1e30f;  // the score of nothing; as NEVER in pallas_kernels/reference.py

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline Vector load(const float* at) {
  Vector out;
  std::memcpy(&out, at, sizeof out);
  return out;
}
inline void store(float* at, Vector x) { std::memcpy(at, &x, sizeof x); }

inline Vector load_as_float(const float* at) { return load(at); }
inline Vector load_as_float(const BFloat16* at) {
#if defined(__AVX512F__)  // one instruction, where GCC makes four of what follows
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
#else
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Vector out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

inline Vector load_as_float(const int8_t* at) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, at, sizeof bytes);
  return __builtin_convertvector(bytes, Vector);
#endif
}

// Two bfloat16 in each 32 bits, the first of them in the lower half.
inline Bits load_pairs(const BFloat16* at) {
  Bits out;
  std::memcpy(&out, at, sizeof out);
  return out;
}
inline Vector firsts(Bits pairs) {
  const Bits bits = pairs << 16;
  Vector out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline Vector seconds(Bits pairs) {
  const Bits bits = pairs & 0xffff0000;
  Vector out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// The number at x, or the pair in every lane, for all of a vector.
inline float same(const float* x) { return *x; }
inline Bits same(const BFloat16* x) {
  uint32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return Bits{} + pair;
}

inline Vector add_products(Vector sums, float x, Vector y) { return sums + x * y; }

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;

// sums + for each pair the products of its first and its second numbers.
inline Vector add_products(Vector sums, Bits x, Bits y) {
  return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(x),
                                                   reinterpret_cast<__m512bh>(y)));
}

// The numbers of two vectors of bfloat16 as pairs, one of each: those of the first halves, and of the second.
inline std::pair<Bits, Bits> interleave(Bits firsts, Bits seconds) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint16_t, 4 * kLanes> found{};
    for (int i = 0; i < 2 * kLanes; i++) found[2 * i] = i, found[2 * i + 1] = i + 2 * kLanes;
    return found;
  }();
  const auto a = reinterpret_cast<__m512i>(firsts), b = reinterpret_cast<__m512i>(seconds);
  const auto half = [&](int i) {
    return reinterpret_cast<Bits>(_mm512_permutex2var_epi16(a, _mm512_load_si512(order.data() + 2 * i * kLanes), b));
  };
  return {half(0), half(1)};
}

// Pairs of two vectors' numbers, to nearest.
inline Bits in_pairs(Vector firsts, Vector seconds) {
  const auto halves = [](Vector x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
  };
  return reinterpret_cast<Bits>(_mm512_or_si512(halves(firsts), _mm512_slli_epi32(halves(seconds), 16)));
}
#else
constexpr bool kMultipliesPairs = false;

inline Vector add_products(Vector sums, Bits x, Bits y) {
  return sums + firsts(x) * firsts(y) + seconds(x) * seconds(y);
}

inline std::pair<Bits, Bits> interleave(Bits firsts, Bits seconds) {
  uint16_t of_firsts[2 * kLanes], of_seconds[2 * kLanes], found[4 * kLanes];
  std::memcpy(of_firsts, &firsts, sizeof firsts), std::memcpy(of_seconds, &seconds, sizeof seconds);
  for (int i = 0; i < 2 * kLanes; i++) found[2 * i] = of_firsts[i], found[2 * i + 1] = of_seconds[i];
  std::pair<Bits, Bits> out;
  std::memcpy(&out.first, found, sizeof firsts), std::memcpy(&out.second, found + 2 * kLanes, sizeof seconds);
  return out;
}

inline Bits in_pairs(Vector firsts, Vector seconds) {
  BFloat16 pairs[2 * kLanes];
  for (int i = 0; i < kLanes; i++) from_float(firsts[i], pairs + 2 * i), from_float(seconds[i], pairs + 2 * i + 1);
  return load_pairs(pairs);
}
#endif

inline void store_as(float* at, Vector x) { store(at, x); }
inline void store_as(BFloat16* at, Vector x) {  // to nearest; where one instruction does it, tiny numbers become 0
#if defined(__AVX512BF16__)
  const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  std::memcpy(at, &halves, sizeof halves);
#else
  for (int i = 0; i < kLanes; i++) from_float(x[i], at + i);
#endif
}

// What numbers are multiplied as with some of Number.
template <class Number>
using Factor = std::conditional_t<kMultipliesPairs, Number, float>;

// The sums of four vectors to out[0..3].
inline void sum_four(Vector a, Vector b, Vector c, Vector d, float* out) {
#if defined(__AVX512F__)
  const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  const auto z = reinterpret_cast<__m512>(c), w = reinterpret_cast<__m512>(d);
  const auto xy = reinterpret_cast<__m512d>(_mm512_unpacklo_ps(x, y) + _mm512_unpackhi_ps(x, y));
  const auto zw = reinterpret_cast<__m512d>(_mm512_unpacklo_ps(z, w) + _mm512_unpackhi_ps(z, w));
  const auto by_quarter = reinterpret_cast<__m512>(_mm512_unpacklo_pd(xy, zw)) +
                          reinterpret_cast<__m512>(_mm512_unpackhi_pd(xy, zw));
  const auto half = _mm512_castps512_ps256(by_quarter) +
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(by_quarter), 1));
  _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  const auto sum = [](Vector x) {
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += x[i];
    return total;
  };
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// The sum of a vector's numbers, in the same order as that of four.
inline float sum(Vector x) {
  float totals[4];
  sum_four(x, x, x, x, totals);
  return totals[0];
}

// e^x to about 2 units in the last place, for x <= 0; below -87 it is 0. NaN stays NaN.
inline Vector exp(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  const auto too_low = x < lowest;
  const Vector in_range = too_low ? lowest : x;
  typedef int32_t Whole __attribute__((vector_size(kLanes * 4)));
  const Vector shifted = in_range * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23 rounds to a whole number
  const Vector power = shifted - 12582912.0f;
  const Vector rest = in_range - power * 0.693359375f + power * 2.12194440e-4f;
  Vector series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  Whole bits, scaled;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&scaled, &series, sizeof scaled);
  scaled += bits << 23;  // the low bits of `shifted` are the power of two
  Vector out;
  std::memcpy(&out, &scaled, sizeof out);
  return x != x ? x : too_low ? Vector{} : out;
}

}  // namespace apt
