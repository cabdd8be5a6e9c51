// x [rows, inputs] times a kernel packed in tiles `[outputs / kPackedWidth, inputs, kPackedWidth]`, padded with zeros;
// in bfloat16 `[outputs / kPackedWidth, inputs / 2, kPackedWidth, 2]`, two inputs adjacent, of codes (int8.h) four of them,
// with zeros after the last input.
//
// A packed tile is read from start to end, so it can be prefetched; a tile of rows multiplies it without a sum across a
// vector. A result is the sum over inputs in their order, for any number of rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "int8.h"
#include "memory.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kPackedWidth = 32;  // outputs of a packed tile; as PACKED_OUTPUTS in packed.py
constexpr int kVectors = kPackedWidth / kLanes;
#if defined(__AVX512F__)
constexpr int kTallest = 14;  // rows of a tile: 28 of 32 registers are sums
#else
constexpr int kTallest = 3;
#endif
constexpr int kStepsAtOnce = 768;       // of a packed tile, between which sums go to memory
constexpr int kTilesOfBlock = (128 + kTallest - 1) / kTallest;  // that share a packed tile while it is in the cache
constexpr int kBytesAtOnce = 512 << 10;  // of a block's x: half of the second cache
constexpr int kBytesAhead = 4096;  // of few rows' packed tiles: from memory to the first cache
constexpr int kTilesToWiden = 4;  // from which on a packed tile is widened to x's type once for all of them

// Number of adjacent inputs, both in a packed tile and in a tile of x, that one step of a product takes.
template <class Number>
constexpr int kInStep = std::is_same_v<Number, int8_t> ? 4 : std::is_same_v<Number, BFloat16> ? 2 : 1;

// Inputs of x, with zeros that any kernel's last step takes.
inline int padded(int inputs) { return (inputs + 3) / 4 * 4; }

inline int packed_tiles(int outputs) { return (outputs + kPackedWidth - 1) / kPackedWidth; }

// Row tiles of about the same height: the first `taller` have one row more. Each tile of the
// rows `[rows, padded(inputs)]` is transposed: `[inputs, rows of the tile]`, of bfloat16 `[inputs / 2, rows of the tile, 2]`,
// of codes `[inputs / 4, rows of the tile, 4]`.
struct Tiles {
  int count, height, taller;

  explicit Tiles(int rows)
      : count((rows + kTallest - 1) / kTallest), height(rows / std::max(count, 1)), taller(rows % std::max(count, 1)) {}
  int first(int i) const { return i * height + std::min(i, taller); }
  int rows(int i) const { return height + (i < taller); }
  int of(int row) const {
    const int in_taller = taller * (height + 1);
    return row < in_taller ? row / (height + 1) : taller + (row - in_taller) / height;
  }
};

// What makes results of sums over codes; without `of_outputs` sums stay what they are.
struct Scales {
  const float* of_outputs = nullptr;
  float unit = 1;                  // of all
  const float* of_rows = nullptr;  // if rows are codes too
  const int32_t* begins = nullptr;  // by row, what its sums begin with, if rows are codes too

  Scales at(int row, int output, bool ends) const {
    return {ends && of_outputs ? of_outputs + output : nullptr, unit, of_rows ? of_rows + row : nullptr,
            begins ? begins + row : nullptr};
  }
};

// So few rows are always a tile alone, which reads packed tiles once.
constexpr bool are_few(int rows) { return 2 * rows < kTallest; }

// out [M, kPackedWidth] (+)= `steps` of x, M rows transposed, times those of a packed tile. Meanwhile prefetches `ahead`
// bytes per step from `next`.
template <int M, class X, class Number>
__attribute__((noinline)) void multiply_tile(const X* x, const Number* packed_tile, int steps, float* out,
                                             size_t out_step, bool adds, const char* next, int ahead,
                                             const Scales& scales) {
  using Sum = std::conditional_t<std::is_same_v<X, int8_t>, Whole, Vector>;
  Sum sums[M][kVectors] = {};
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++)
      if (adds)
        std::memcpy(&sums[m][v], out + m * out_step + v * kLanes, sizeof(Sum));
      else if constexpr (std::is_same_v<X, int8_t>)
        sums[m][v] += scales.begins[m];
  const auto add = [&](const X* x, const auto& numbers) {
    decltype(numbers(0)) own[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) own[v] = numbers(v);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++)
        sums[m][v] = add_products(sums[m][v], same(x + m * kInStep<X>), own[v]);
  };
  constexpr int kWide = kInStep<Number>, kCache = are_few(M) ? 3 : 2;  // 3 is the first cache
  for (int i = 0; i < steps; i++, x += M * kWide, packed_tile += kPackedWidth * kWide, next += ahead) {
    __builtin_prefetch(next, 0, kCache);
    __builtin_prefetch(next + ahead / 2, 0, kCache);
    const auto at = [&](int v) { return packed_tile + v * kLanes * kWide; };
    if constexpr (std::is_same_v<X, int8_t>) {
      add(x, [&](int v) { return as_factors(load_codes(at(v))); });
    } else if constexpr (std::is_same_v<X, BFloat16> && std::is_same_v<Number, int8_t>) {
      add(x, [&](int v) { return widened_pair<0>(load_codes(at(v))); });
      add(x + 2 * M, [&](int v) { return widened_pair<2>(load_codes(at(v))); });
    } else if constexpr (std::is_same_v<X, BFloat16>) {
      add(x, [&](int v) { return load_pairs(at(v)); });
    } else if constexpr (std::is_same_v<Number, int8_t>) {
      add(x, [&](int v) { return widened<0>(load_codes(at(v))); });
      add(x + M, [&](int v) { return widened<1>(load_codes(at(v))); });
      add(x + 2 * M, [&](int v) { return widened<2>(load_codes(at(v))); });
      add(x + 3 * M, [&](int v) { return widened<3>(load_codes(at(v))); });
    } else if constexpr (std::is_same_v<Number, BFloat16>) {
      add(x, [&](int v) { return firsts(load_pairs(at(v))); });
      add(x + M, [&](int v) { return seconds(load_pairs(at(v))); });
    } else {
      add(x, [&](int v) { return load(at(v)); });
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      float* to = out + m * out_step + v * kLanes;
      if (!scales.of_outputs)
        std::memcpy(to, &sums[m][v], sizeof(Sum));
      else if constexpr (std::is_same_v<X, int8_t>)
        store(to, to_floats(sums[m][v]) * scales.of_rows[m] * load(scales.of_outputs + v * kLanes));
      else
        store(to, sums[m][v] * (load(scales.of_outputs + v * kLanes) * scales.unit));
    }
}

template <class X, class Number, int M = kTallest>
inline void multiply_tile_of(int rows, const X* x, const Number* packed_tile, int steps, float* out, size_t out_step,
                             bool adds, const char* next, int ahead, const Scales& scales = {}) {
  if constexpr (M > 1)
    if (rows < M)
      return multiply_tile_of<X, Number, M - 1>(rows, x, packed_tile, steps, out, out_step, adds, next, ahead, scales);
  multiply_tile<M>(x, packed_tile, steps, out, out_step, adds, next, ahead, scales);
}

// Inputs of a packed tile as float32 `[inputs, kPackedWidth]`, in `room` if need be.
inline const float* as_floats(const float* packed_tile, int, float*) { return packed_tile; }
inline const float* as_floats(const BFloat16* packed_tile, int inputs, float* room) {
  for (int i = 0; i < inputs * kPackedWidth; i += 2 * kPackedWidth)
    for (int lane = 0; lane < kPackedWidth; lane += kLanes) {
      const Bits pairs = load_pairs(packed_tile + i + 2 * lane);
      store(room + i + lane, firsts(pairs));
      store(room + i + kPackedWidth + lane, seconds(pairs));
    }
  return room;
}

inline const float* as_floats(const int8_t* packed_tile, int inputs, float* room) {  // times kWidened
  for (int i = 0; i < inputs * kPackedWidth; i += 4 * kPackedWidth)
    for (int lane = 0; lane < kPackedWidth; lane += kLanes) {
      const Bits codes = load_codes(packed_tile + i + 4 * lane);
      float* to = room + i + lane;
      store(to, widened<0>(codes)), store(to + kPackedWidth, widened<1>(codes));
      store(to + 2 * kPackedWidth, widened<2>(codes)), store(to + 3 * kPackedWidth, widened<3>(codes));
    }
  return room;
}

// The same, as x's type.
template <class Number>
inline const float* widen(const Number* packed_tile, int inputs, float* room) {
  return as_floats(packed_tile, inputs, room);
}
inline const BFloat16* widen(const int8_t* packed_tile, int inputs, BFloat16* room) {
  for (int i = 0; i < inputs * kPackedWidth; i += 4 * kPackedWidth)
    for (int lane = 0; lane < kPackedWidth; lane += kLanes) {
      const Bits codes = load_codes(packed_tile + i + 4 * lane);
      const Bits first = widened_pair<0>(codes), second = widened_pair<2>(codes);
      std::memcpy(room + i + 2 * lane, &first, sizeof first);
      std::memcpy(room + i + 2 * lane + 2 * kPackedWidth, &second, sizeof second);
    }
  return room;
}

// out [rows, kPackedWidth] at `at`, of which `known` columns are there: `work(to, step)` computes it, there or in a room of its
// own, where it finds what is there already if it `adds`.
template <class Work>
void with_edge(float* at, size_t step, int rows, int known, bool adds, const Work& work) {
  if (known == kPackedWidth) return work(at, step);
  alignas(64) float edge[kTallest * kPackedWidth];
  for (int r = 0; r < rows && adds; r++) std::copy_n(at + r * step, known, edge + r * kPackedWidth);
  work(edge, size_t(kPackedWidth));
  for (int r = 0; r < rows; r++) std::copy_n(edge + r * kPackedWidth, known, at + r * step);
}

// Packed tiles `[begin, end)`, read from start to end, for a tile of few rows from row `first` on; else as `multiply_packed`.
template <class X, class Number>
void multiply_few(const X* x, int first, int rows, const Number* packed, const Scales& scales, int begin, int end,
                  int inputs, float* out, int outputs, const char* after) {
  constexpr int kWide = kInStep<Number>, kNumbers = kPackedWidth * kWide, kStep = kNumbers * sizeof(Number);
  const int all_steps = (inputs + kWide - 1) / kWide, ahead_steps = kBytesAhead / kStep;
  for (int p = begin; p < end; p++)
    for (int at = 0, steps; at < all_steps; at += steps) {
      steps = all_steps - at;
      if (p + 1 == end && steps > ahead_steps) steps -= ahead_steps;  // after which something else is read
      const Number* own = packed + (size_t(p) * all_steps + at) * kNumbers;
      const bool ends = at + steps == all_steps;
      const char* next = reinterpret_cast<const char*>(own) + kBytesAhead;
      if (ends && p + 1 == end) next = after ? after : reinterpret_cast<const char*>(own);
      with_edge(out + size_t(first) * outputs + p * kPackedWidth, outputs, rows,
                std::min(kPackedWidth, outputs - p * kPackedWidth), at > 0, [&](float* to, size_t step) {
                  multiply_tile_of(rows, x + size_t(first) * padded(inputs) + size_t(at) * kWide * rows, own, steps, to,
                                   step, at > 0, next, kStep, scales.at(first, p * kPackedWidth, ends));
                });
    }
}

// Packed tiles `[begin, end)` for the tiles `[first, last)`: x in tiles, out [rows, outputs]. `after`: what is likely to be
// read next, or null.
template <class X, class Number>
void multiply_packed(const X* x, const Tiles& tiles, int first, int last, const Number* packed, const Scales& scales,
                     int begin, int end, int inputs, float* out, int outputs, const char* after) {
  constexpr int kWide = kInStep<Number>;
  constexpr bool kWidens = kWide > kInStep<X>;
  constexpr int kSteps = std::is_same_v<Number, int8_t> ? kStepsAtOnce * kInStep<X> / kWide : kStepsAtOnce;
  const int rows = tiles.first(last) - tiles.first(first), all_steps = (inputs + kWide - 1) / kWide;
  if (are_few(rows))
    return multiply_few(x, tiles.first(first), rows, packed, scales, begin, end, inputs, out, outputs, after);
  const int most = kBytesAtOnce / int(sizeof(X)) / kWide;
  const int depth = std::max(most / rows / kSteps, 1) * kSteps;
  for (int from = 0; from < all_steps; from += depth)
    for (int p = begin; p < end; p++) {
      const int to = std::min(from + depth, all_steps);
      for (int at = from; at < to; at += kSteps) {
        const int steps = std::min(kSteps, to - at);
        const auto packed_at = [&](int p, int step) {
          return packed + (size_t(p) * all_steps + step) * kPackedWidth * kWide;
        };
        const Number* own = packed_at(p, at);
        const bool is_last = p + 1 == end && at + steps == to;
        const Number* following = at + steps < to ? packed_at(p, at + steps) : packed_at(p + 1, from);
        if (is_last) following = packed_at(begin, to);  // if there is more of these
        const char* next = is_last && to == all_steps ? after : reinterpret_cast<const char*>(following);
        const int share = next ? int(sizeof(Number)) * kPackedWidth * kWide / (last - first) : 0;
        if (!next) next = reinterpret_cast<const char*>(own);
        const bool ends = at + steps == all_steps;
        const auto all_tiles = [&](const auto* packed_tile, int tile_steps) {
          for (int i = first; i < last; i++) {
            const int m = tiles.first(i), height = tiles.rows(i);
            const int known = std::min(kPackedWidth, outputs - p * kPackedWidth);
            const X* own_x = x + size_t(m) * padded(inputs) + size_t(at) * kWide * height;
            const char* ahead = next + size_t(i - first) * share * steps;
            const int ahead_a_step = share * steps / tile_steps;
            const Scales own_scales = scales.at(m, p * kPackedWidth, ends);
            with_edge(out + size_t(m) * outputs + p * kPackedWidth, outputs, height, known, at > 0,
                      [&](float* to, size_t step) {
                        multiply_tile_of(height, own_x, packed_tile, tile_steps, to, step, at > 0, ahead, ahead_a_step,
                                         own_scales);
                      });
          }
        };
        if constexpr (kWidens)
          if (last - first >= kTilesToWiden) {
            alignas(64) thread_local X room[kSteps * kWide * kPackedWidth];
            all_tiles(widen(own, kWide * steps, room), kWide / kInStep<X> * steps);
            continue;
          }
        all_tiles(own, steps);
      }
    }
}

// out [inputs / kWide, rows, kWide], its columns `out_step` rows long, of `row(m)[i]`, a part at a time: rows may be as far
// apart as is bad for the first cache. `number` makes a float32 of what is found, `number(found, i)`. Zeros follow up to
// input number `end`.
template <int kWide, class Row, class X, class Make>
inline void transpose(const Row& row, int rows, int inputs, X* out, int out_step, const Make& number, int end = 0) {
  constexpr int kPart = 64;
  for (int from = 0; from < inputs; from += kPart)
    for (int m = 0; m < rows; m++) {
      const auto own = row(m) + from;
      const int count = std::min(kPart, inputs - from);
      X* to = out + (size_t(from / kWide) * out_step + m) * kWide;
      if constexpr (kWide == 1) {
        for (int i = 0; i < count; i++) from_float(number(own[i], from + i), to + size_t(i) * out_step);
      } else {
        X part[kPart + 1];
        for (int i = 0; i < count; i++) from_float(number(own[i], from + i), part + i);
        part[count] = X{};
        for (int i = 0; i < count; i += kWide)
          std::memcpy(to + size_t(i) * out_step, part + i, kWide * sizeof(X));
      }
    }
  for (int i = (inputs + kWide - 1) / kWide; i * kWide < end; i++)
    for (int m = 0; m < rows; m++) std::fill_n(out + (size_t(i) * out_step + m) * kWide, kWide, X{});
}

template <class Row, class X, class Make>
inline void transpose(const Row& row, int rows, int inputs, X* out, int out_step, const Make& number, int end = 0) {
  transpose<kInStep<X>>(row, rows, inputs, out, out_step, number, end);
}

template <class Row, class X>
inline void transpose(const Row& row, int rows, int inputs, X* out, int out_step, int end = 0) {
  transpose(row, rows, inputs, out, out_step, [](auto found, int) { return to_float(found); }, end);
}

// out [padded(inputs) / kWide, rows, kWide]: codes of `row(m)[i]`, times `factor[i]` if there is one, and each row's scale and
// what its sums begin with.
template <int kWide, class Row>
inline void transpose_codes(const Row& row, int rows, int inputs, const float* factor, int8_t* out, float* scales,
                            int32_t* begins) {
  constexpr int kPart = 64;
  thread_local Scratch scratch;
  float* own = scratch.of(inputs);
  for (int m = 0; m < rows; m++) {
    const auto found = row(m);
    for (int i = 0; i < inputs; i++) own[i] = factor ? to_float(found[i]) * factor[i] : to_float(found[i]);
    const RowScale scale(greatest_magnitude(own, inputs));
    int32_t sum = 0;
    for (int from = 0; from < inputs; from += kPart) {
      const int count = std::min(kPart, inputs - from);
      int8_t part[kPart] = {};
      encode(own + from, count, scale.factor, part);
      for (int i = 0; i < kPart; i++) sum += part[i];
      for (int i = 0; i < count; i += kWide)
        std::memcpy(out + (size_t(from + i) * rows + m * kWide), part + i, kWide);
    }
    scales[m] = scale.scale, begins[m] = -kOffset * sum;
  }
}

}  // namespace apt
