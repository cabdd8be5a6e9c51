// Decode rows of hidden vectors: queries times Wk^T become as wide as the vectors, and what is found times Wv. Source:
// docs/hybrid_cache.md.
//
// q [rows, heads, H], wide [rows, heads, D]. Kernels may be codes; rows stay as they are.
#pragma once

#include <algorithm>
#include <utility>

#include "attention.h"
#include "matmul.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kRowsTogether = 8;  // from which on queries of all are made wide at once

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

// wide [begin, end) of one head and kRows rows, `step` apart = the head's packed tiles times their queries, `width` apart,
// rounded to Number. Inputs are the lanes of vectors, so that sums are in the order of `absorb_together`.
template <int kRows, class Number, class Packed>
void absorb_few(const float* q, const Packed* packed, const Shape& shape, int begin, int end, float* wide) {
  const int D = shape.width, H = D / shape.heads;
  const size_t step = size_t(shape.heads) * D;
  for (int at = begin; at < end; at += kLanes) {
    Vector sums[kRows] = {};
    for (int j = 0; j < H; j += kLanes) {
      const Packed* packed_tile = packed + size_t(j / kPackedWidth * kPackedWidth) * D;
      Vector inputs[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) inputs[i] = of_inputs(packed_tile, at + i, j % kPackedWidth);
      transpose(inputs);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) sums[r] += inputs[i] * q[size_t(r) * D + j + i];
    }
    for (int r = 0; r < kRows; r++)
      for (int i = 0; i < kLanes; i++) wide[r * step + at + i] = rounded<Number>(sums[r][i]);
  }
}

// The same of as many rows as there are, fewer than kRowsTogether.
template <int kRows, class Number, class Packed>
void absorb_few_of(const float* q, const Packed* packed, const Shape& shape, int begin, int end, float* wide) {
  if constexpr (kRows > 1)
    if (shape.rows < kRows) return absorb_few_of<kRows - 1, Number>(q, packed, shape, begin, end, wide);
  absorb_few<kRows, Number>(q, packed, shape, begin, end, wide);
}

// The same of all rows for one head; rows are the lanes of vectors, which pays for many.
template <class Number, class Packed>
void absorb_together(const float* q, const Packed* packed, const Shape& shape, int begin, int end, float* wide) {
  constexpr int kInputs = 8;
  const int D = shape.width, H = D / shape.heads;
  const size_t step = size_t(shape.heads) * D;
  thread_local Scratch scratch;
  float* queries = scratch.of(size_t(H) * kPackedWidth);
  for (int first = 0; first < shape.rows; first += kPackedWidth) {
    const int rows = std::min(kPackedWidth, shape.rows - first);
    transpose([&](int r) { return q + size_t(first + r) * D; }, rows, H, queries, kPackedWidth);
    for (int at = begin; at < end; at += kInputs) {
      alignas(64) float found[kInputs * kPackedWidth];
      alignas(64) float room[kInputs * kPackedWidth];
      for (int from = 0; from < H; from += kPackedWidth) {
        const Packed* packed_tile = packed + size_t(from) * D;
        const float* inputs = as_floats(packed_tile + size_t(at) * kPackedWidth, kInputs, room);
        for (int lane = 0; lane < rows; lane += kLanes) {
          Vector sums[kInputs] = {};
#pragma GCC unroll 8
          for (int i = 0; i < kInputs && from; i++) sums[i] = load(found + i * kPackedWidth + lane);
          for (int j = 0; j < kPackedWidth; j++) {
            const Vector own = load(queries + size_t(from + j) * kPackedWidth + lane);
#pragma GCC unroll 8
            for (int i = 0; i < kInputs; i++) sums[i] += inputs[i * kPackedWidth + j] * own;
          }
#pragma GCC unroll 8
          for (int i = 0; i < kInputs; i++) store(found + i * kPackedWidth + lane, sums[i]);
        }
      }
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < kInputs; i++)
          wide[(first + r) * step + at + i] = rounded<Number>(found[i * kPackedWidth + r]);
    }
  }
}

// Queries made wide; q is changed. `width [D]` of channels that vectors are relative to may be null.
template <class Number>
void absorb(Team& team, const Shape& shape, float* q, const Kernel& kernel, const float* width, float* wide) {
  constexpr int kPart = 256;
  const int D = shape.width, N = shape.heads, H = D / N, parts = (D + kPart - 1) / kPart;
  if (kernel.is_codes())  // the scales of its outputs go into the queries
    for (int r = 0; r < shape.rows; r++)
      for (int i = 0; i < D; i++) q[size_t(r) * D + i] *= kernel.scale[i] / kWidened;
  const auto of_head = [&](const auto* packed, int n, int begin, int end) {
    packed += size_t(n) * H * D;
    const auto own = [&](int r) { return wide + (size_t(r) * N + n) * D; };
    if (shape.rows >= kRowsTogether)
      absorb_together<Number>(q + n * H, packed, shape, begin, end, own(0));
    else
      absorb_few_of<kRowsTogether - 1, Number>(q + n * H, packed, shape, begin, end, own(0));
    for (const float* factor : {kernel.factor, width})
      for (int r = 0; factor && r < shape.rows; r++)
        for (int i = begin; i < end; i++) own(r)[i] *= factor[i];
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
  const int D = shape.width, N = shape.heads, H = D / N;
  const Tiles tiles(shape.rows);
  team.run(N, double(shape.rows) * D * D, [&](int n) {
    thread_local Scratch scratch;
    float* transposed = scratch.of(size_t(shape.rows) * D);
    for (int tile = 0; tile < tiles.count; tile++) {
      const int first = tiles.first(tile), rows = tiles.rows(tile);
      transpose([&](int m) { return found + (size_t(first + m) * N + n) * D; }, rows, D,
                transposed + size_t(first) * D, rows,
                [&](float x, int i) {
                  if (centre) x = centre[i] + width[i] * x;
                  return kernel.factor ? x * kernel.factor[i] : x;
                });
    }
    const auto multiply = [&](const auto* packed, const Scales& scales) {
      multiply_packed<float>(transposed, tiles, 0, tiles.count, packed + size_t(n) * H * D, scales, 0,
                             H / kPackedWidth, D, out + n * H, D);
    };
    if (kernel.is_codes())
      multiply(kernel.as<int8_t>(), {kernel.scale + n * H, 1 / kWidened});
    else
      multiply(kernel.as<Number>(), {});
    for (int r = 0; bias && r < shape.rows; r++)
      for (int i = n * H; i < (n + 1) * H; i++) out[size_t(r) * D + i] += to_float(bias[i]);
  });
}

}  // namespace apt
