// Decode rows of hidden vectors: queries times Wk^T become as wide as the vectors, and what is found times Wv. Source:
// docs/hybrid_cache.md.
//
// q [rows, heads, H], wide [rows, heads, D]. Kernels may be codes; rows stay as they are.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "memory.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

template <class Number>
inline float rounded(float x) {
  Number out;
  from_float(x, &out);
  return to_float(out);
}

// The numbers of one input in a packed tile, of the outputs from `lane` on.
inline Vector of_inputs(const float* packed_tile, int i, int lane) {
  return load(packed_tile + size_t(i) * kPackedWidth + lane);
}
inline Vector of_inputs(const BFloat16* packed_tile, int i, int lane) {
  const Bits pairs = load_pairs(packed_tile + (size_t(i / 2) * kPackedWidth + lane) * 2);
  return i % 2 ? seconds(pairs) : firsts(pairs);
}
inline Vector of_inputs(const int8_t* packed_tile, int i, int lane) {  // times kWidened
  const Bits codes = load_codes(packed_tile + (size_t(i / 4) * kPackedWidth + lane) * 4);
  return to_floats(reinterpret_cast<Whole>(codes << (24 - 8 * (i % 4)) & 0xff000000));
}

#if defined(__AVX512BF16__)
// Of two inputs, the first an even one, as pairs: the outputs from `lane` on; of codes times kWidened.
inline Bits pair_of_inputs(const BFloat16* packed_tile, int i, int lane) {
  return load_pairs(packed_tile + (size_t(i / 2) * kPackedWidth + lane) * 2);
}
inline Bits pair_of_inputs(const int8_t* packed_tile, int i, int lane) {
  const Bits codes = load_codes(packed_tile + (size_t(i / 4) * kPackedWidth + lane) * 4);
  return i % 4 ? widened_pair<2>(codes) : widened_pair<0>(codes);
}
#endif

// Blocks of kHalf lanes change places: those of `a` with an odd number, and those of `b` with an even one.
template <int kHalf, int... kLane>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, kLane...>) {
  const Vector first = a, second = b;
  a = __builtin_shufflevector(first, second, (kLane & kHalf ? kLanes + kLane - kHalf : kLane)...);
  b = __builtin_shufflevector(first, second, (kLane & kHalf ? kLanes + kLane : kLane + kHalf)...);
}

// Vector i of `x` becomes lane i of each.
template <int kHalf = kLanes / 2>
inline void transpose(Vector (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++)
    if (!(i & kHalf)) exchange<kHalf>(x[i], x[i + kHalf], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kHalf > 1) transpose<kHalf / 2>(x);
}

// out [size / kWide, kPackedWidth, kWide] of X: the kernel's outputs `[first, first + size)`, a multiple of kLanes, as
// the inputs of a packed tile whose outputs are the kernel's inputs `[at, at + kPackedWidth)`. So Wk^T is multiplied
// like any packed kernel; transposing it takes a fifth of the time of a product with 8 rows. Codes: times kWidened.
template <class X, class Packed>
void transpose_packed(const Packed* packed, int inputs, int first, int size, int at, X* out) {
  for (int j = 0; j < size; j += kLanes) {
    const int output = first + j;
    const Packed* packed_tile = packed + size_t(output / kPackedWidth * kPackedWidth) * inputs;
    const int lane = output % kPackedWidth;
    Vector found[kLanes];
    if constexpr (std::is_same_v<X, float>) {
      for (int half = 0; half < kPackedWidth; half += kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) found[i] = of_inputs(packed_tile, at + half + i, lane);
        transpose(found);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store(out + size_t(j + i) * kPackedWidth + half, found[i]);
      }
    } else {
      static_assert(kPackedWidth == 2 * kLanes || !kMultipliesPairs);  // else X is never BFloat16
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) found[i] = reinterpret_cast<Vector>(pair_of_inputs(packed_tile, at + 2 * i, lane));
      transpose(found);  // of each output all inputs, one after the other
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i += 2) {
        const auto [low, high] = interleave(reinterpret_cast<Bits>(found[i]), reinterpret_cast<Bits>(found[i + 1]));
        X* to = out + size_t(j + i) * kPackedWidth;
        std::memcpy(to, &low, sizeof low), std::memcpy(to + 2 * kLanes, &high, sizeof high);
      }
    }
  }
}

// Queries made wide; q is changed. `width [D]` of channels that vectors are relative to may be null.
template <class Number>
void absorb(Team& team, const Shape& shape, float* q, const Kernel& kernel, const float* width, Factor<Number>* wide) {
  using X = Factor<Number>;
  constexpr int kPart = 8 * kPackedWidth;
  const int D = shape.width, N = shape.heads, H = D / N, parts = (D + kPart - 1) / kPart;
  if (kernel.is_codes())  // the scales of its outputs go into the queries
    for (int r = 0; r < shape.rows; r++)
      for (int i = 0; i < D; i++) q[size_t(r) * D + i] *= kernel.scale[i] / kWidened;
  const Tiles tiles(shape.rows);
  const auto of_head = [&](const auto* packed, int n, int begin, int end) {
    thread_local Aligned<X> queries, transposed;
    queries.resize(size_t(shape.rows) * H), transposed.resize(size_t(kPackedWidth) * H);
    for (int tile = 0; tile < tiles.count; tile++) {
      const int first = tiles.first(tile);
      transpose([&](int m) { return q + size_t(first + m) * D + n * H; }, tiles.rows(tile), H,
                queries.data() + size_t(first) * H, tiles.rows(tile));
    }
    for (int at = begin; at < end; at += kPackedWidth) {
      transpose_packed(packed, D, n * H, H, at, transposed.data());
      for (int tile = 0; tile < tiles.count; tile++) {
        const int first = tiles.first(tile);
        alignas(64) float products[kTallest * kPackedWidth];
        const auto* next = reinterpret_cast<const char*>(transposed.data());
        multiply_tile_of(tiles.rows(tile), queries.data() + size_t(first) * H, transposed.data(), H / kInStep<X>,
                         products, kPackedWidth, false, next, 0);
        for (int m = 0; m < tiles.rows(tile); m++)
          for (int i = 0; i < kPackedWidth; i += kLanes) {
            Vector own = load(products + m * kPackedWidth + i);
            if constexpr (!std::is_same_v<X, Number>)  // else it is when it is stored
              for (int lane = 0; lane < kLanes; lane++) own[lane] = rounded<Number>(own[lane]);
            for (const float* factor : {kernel.factor, width})
              if (factor) own *= load(factor + at + i);
            store_as(wide + (size_t(first + m) * N + n) * D + at + i, own);
          }
      }
    }
  };
  team.run(N * parts, 2.0 * shape.rows * N * D * H, [&](int i) {
    const int n = i / parts, begin = i % parts * kPart, end = std::min(begin + kPart, D);
    if (kernel.is_codes())
      of_head(kernel.as<int8_t>(), n, begin, end);
    else
      of_head(kernel.as<Number>(), n, begin, end);
  });
}

// out [rows, heads, H] = what each head's wide query found, `found [rows, heads, D]`, times Wv, and its bias. The bias, and
// the channels' `centre [D]` and `width [D]`, may be null.
template <class Number>
void multiply_values(Team& team, const Shape& shape, const float* found, const Kernel& kernel, const Number* bias,
                     const float* centre, const float* width, float* out) {
  using X = Factor<Number>;
  const int D = shape.width, N = shape.heads, H = D / N;
  const Tiles tiles(shape.rows);
  team.run(N, double(shape.rows) * D * D, [&](int n) {
    thread_local Aligned<X> transposed;
    thread_local Scratch scratch;
    transposed.resize(size_t(shape.rows) * padded(D));
    // `number` has no condition for each number, or the compiler takes them one by one.
    const auto put = [&](const auto& number) {
      for (int tile = 0; tile < tiles.count; tile++) {
        const int first = tiles.first(tile), rows = tiles.rows(tile);
        transpose([&](int m) { return found + (size_t(first + m) * N + n) * D; }, rows, D,
                  transposed.data() + size_t(first) * padded(D), rows, number, padded(D));
      }
    };
    const float* factor = kernel.factor;
    if (centre && factor)
      put([=](float x, int i) { return (centre[i] + width[i] * x) * factor[i]; });
    else if (centre)
      put([=](float x, int i) { return centre[i] + width[i] * x; });
    else if (factor)
      put([=](float x, int i) { return x * factor[i]; });
    else
      put([](float x, int) { return x; });
    // whole packed tiles, of which the outputs outside the head are left out
    const int begin = n * H / kPackedWidth, end = (n * H + H + kPackedWidth - 1) / kPackedWidth;
    const int outputs = (end - begin) * kPackedWidth, before = n * H - begin * kPackedWidth;
    float* products = scratch.of(size_t(shape.rows) * outputs);
    const auto multiply = [&](const auto* packed, const Scales& scales) {
      multiply_packed<X>(transposed.data(), tiles, 0, tiles.count, packed + size_t(begin) * kPackedWidth * D, scales, 0,
                         end - begin, D, products, outputs, nullptr);
    };
    if (kernel.is_codes())
      multiply(kernel.as<int8_t>(), {kernel.scale + begin * kPackedWidth, 1 / kWidened});
    else
      multiply(kernel.as<Number>(), {});
    for (int r = 0; r < shape.rows; r++)
      for (int i = 0; i < H; i++) {
        const float own = products[size_t(r) * outputs + before + i];
        out[size_t(r) * D + n * H + i] = bias ? own + to_float(bias[n * H + i]) : own;
      }
  });
}

}  // namespace apt
