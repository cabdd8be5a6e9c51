// x [rows, inputs] times a kernel packed in tiles `[outputs / kPackedWidth, inputs, kPackedWidth]`, padded with zeros;
// in bfloat16 `[outputs / kPackedWidth, inputs / 2, kPackedWidth, 2]`, two inputs adjacent.
//
// A packed tile is read from start to end, so it can be prefetched; a tile of rows multiplies it without a sum across a
// vector. A result is the sum over inputs in their order, for any number of rows.
#pragma once

#include <algorithm>
#include <functional>
#include <type_traits>
#include <vector>

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
constexpr int kTilesToWiden = 4;  // from which on a bfloat16 packed tile is widened to float32 once for all of them

// Number of adjacent inputs, both in a packed tile and in a tile of x, that one step of a product takes.
template <class Number>
constexpr int kInStep = std::is_same_v<Number, BFloat16> ? 2 : 1;

// Row tiles of about the same height: the first `taller` have one row more. Each tile of the
// rows `[rows, inputs]` is transposed: `[inputs, rows of the tile]`, of bfloat16 `[inputs / 2, rows of the tile, 2]`.
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

// out [M, kPackedWidth] (+)= `steps` of x, M rows transposed, times those of a packed tile. Meanwhile prefetches `ahead`
// bytes per step from `next`.
template <int M, class X, class Number>
__attribute__((noinline)) void multiply_tile(const X* x, const Number* packed_tile, int steps, float* out,
                                             size_t out_step, bool adds, const char* next, int ahead) {
  Vector sums[M][kVectors] = {};
  if (adds)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sums[m][v] = load(out + m * out_step + v * kLanes);
  const auto add = [&](const float* x, const auto& numbers) {
    Vector own[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) own[v] = numbers(v);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sums[m][v] += x[m] * own[v];
  };
  constexpr int kWide = kInStep<Number>;
  for (int i = 0; i < steps; i++, x += M * kWide, packed_tile += kPackedWidth * kWide, next += ahead) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + ahead / 2, 0, 2);
    if constexpr (std::is_same_v<X, BFloat16>) {
      Bits own[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) own[v] = load_pairs(packed_tile + v * kLanes * 2);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) sums[m][v] = add_products(sums[m][v], same_pair(x + 2 * m), own[v]);
    } else if constexpr (std::is_same_v<Number, BFloat16>) {
      add(x, [&](int v) { return firsts(load_pairs(packed_tile + v * kLanes * 2)); });
      add(x + M, [&](int v) { return seconds(load_pairs(packed_tile + v * kLanes * 2)); });
    } else {
      add(x, [&](int v) { return load(packed_tile + v * kLanes); });
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) store(out + m * out_step + v * kLanes, sums[m][v]);
}

template <class X, class Number, int M = kTallest>
inline void multiply_tile_of(int rows, const X* x, const Number* packed_tile, int steps, float* out, size_t out_step,
                             bool adds, const char* next, int ahead) {
  if constexpr (M > 1)
    if (rows < M)
      return multiply_tile_of<X, Number, M - 1>(rows, x, packed_tile, steps, out, out_step, adds, next, ahead);
  multiply_tile<M>(x, packed_tile, steps, out, out_step, adds, next, ahead);
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

// Packed tiles `[begin, end)` for the tiles `[first, last)`: x in tiles, out [rows, outputs].
template <class X, class Number>
void multiply_packed(const X* x, const Tiles& tiles, int first, int last, const Number* packed, int begin, int end,
                     int inputs, float* out, int outputs) {
  constexpr int kWide = kInStep<Number>;
  const int rows = tiles.first(last) - tiles.first(first), all_steps = inputs / kWide;
  const int most = kBytesAtOnce / int(sizeof(X)) / kWide;
  const int depth = std::max(most / rows / kStepsAtOnce, 1) * kStepsAtOnce;
  alignas(64) float edge[kTallest * kPackedWidth];
  for (int from = 0; from < all_steps; from += depth)
    for (int p = begin; p < end; p++) {
      const int to = std::min(from + depth, all_steps);
      for (int at = from; at < to; at += kStepsAtOnce) {
        const int steps = std::min(kStepsAtOnce, to - at);
        const auto packed_at = [&](int p, int step) {
          return packed + (size_t(p) * all_steps + step) * kPackedWidth * kWide;
        };
        const Number* own = packed_at(p, at);
        const Number* next = at + steps < to ? packed_at(p, at + steps) : packed_at(p + 1, from);
        const int share = int(sizeof(Number)) * kPackedWidth * kWide / (last - first);
        const auto all_tiles = [&](const auto* packed_tile, int tile_steps) {
          for (int i = first; i < last; i++) {
            const int m = tiles.first(i), height = tiles.rows(i);
            const int known = std::min(kPackedWidth, outputs - p * kPackedWidth);
            const X* own_x = x + size_t(m) * inputs + size_t(at) * kWide * height;
            const char* ahead = reinterpret_cast<const char*>(next) + size_t(i - first) * share * steps;
            const int ahead_a_step = share * steps / tile_steps;
            float* own_out = out + size_t(m) * outputs + p * kPackedWidth;
            if (known == kPackedWidth) {
              multiply_tile_of(height, own_x, packed_tile, tile_steps, own_out, outputs, at > 0, ahead, ahead_a_step);
              continue;
            }
            if (at > 0)
              for (int r = 0; r < height; r++)
                std::copy_n(own_out + size_t(r) * outputs, known, edge + r * kPackedWidth);
            multiply_tile_of(height, own_x, packed_tile, tile_steps, edge, kPackedWidth, at > 0, ahead, ahead_a_step);
            for (int r = 0; r < height; r++) std::copy_n(edge + r * kPackedWidth, known, own_out + size_t(r) * outputs);
          }
        };
        if constexpr (std::is_same_v<X, float> && std::is_same_v<Number, BFloat16>)
          if (last - first >= kTilesToWiden) {
            alignas(64) thread_local float widened[kStepsAtOnce * 2 * kPackedWidth];
            as_floats(own, 2 * steps, widened);
            all_tiles(widened, 2 * steps);
            continue;
          }
        all_tiles(own, steps);
      }
    }
}

// out [inputs, rows], of bfloat16 `[inputs / 2, rows, 2]`, its columns `out_step` rows long, of `row(m)[i]`, a part at a
// time: rows may be as far apart as is bad for the first cache. `number` makes a float32 of what is found,
// `number(found, i)`.
template <class Row, class X, class Make>
inline void transpose(const Row& row, int rows, int inputs, X* out, int out_step, const Make& number) {
  constexpr int kPart = 64, kWide = kInStep<X>;
  for (int from = 0; from < inputs; from += kPart)
    for (int m = 0; m < rows; m++) {
      const auto* own = row(m) + from;
      const int count = std::min(kPart, inputs - from);
      X* to = out + (size_t(from / kWide) * out_step + m) * kWide;
      if constexpr (kWide == 1) {
        for (int i = 0; i < count; i++) from_float(number(own[i], from + i), to + size_t(i) * out_step);
      } else {
        X part[kPart];
        for (int i = 0; i < count; i++) from_float(number(own[i], from + i), part + i);
        for (int i = 0; i < count; i += kWide)
          std::memcpy(to + size_t(i) * out_step, part + i, kWide * sizeof(X));
      }
    }
}

template <class Row, class X>
inline void transpose(const Row& row, int rows, int inputs, X* out, int out_step) {
  transpose(row, rows, inputs, out, out_step, [](auto found, int) { return to_float(found); });
}

template <class Number>
struct Product {
  const Number* packed;
  int outputs;
  float* out;  // [rows, outputs]
  // What is to be done with its rows `[first, last)`, outputs `[begin, end)`: finish(first, last, begin, end), or none.
  std::function<void(int, int, int, int)> finish;
  int from, to;  // rows that are wanted; others may be left out
};

// Products of the same x [rows, inputs], which is in tiles.
template <class X, class Number>
void multiply(Team& team, const X* x, const Tiles& tiles, int inputs, const std::vector<Product<Number>>& products) {
  struct Piece {
    int product, first, last, begin, end;  // tiles of rows, packed tiles
  };
  const int blocks = (tiles.count + kTilesOfBlock - 1) / kTilesOfBlock;
  const int most_parts = (blocks > 1 ? 2 : 6) * team.threads();
  std::vector<Piece> pieces;
  double size = 0;
  for (size_t which = 0; which < products.size(); which++) {
    const Product<Number>& own = products[which];
    const int packed_tiles = (own.outputs + kPackedWidth - 1) / kPackedWidth;
    const int parts = std::min(packed_tiles, most_parts);
    for (int part = 0; part < parts; part++)
      for (int block = 0; block < blocks; block++) {
        const int first = block * tiles.count / blocks, last = (block + 1) * tiles.count / blocks;
        if (tiles.first(last) > own.from && tiles.first(first) < own.to)
          pieces.push_back({int(which), first, last, part * packed_tiles / parts, (part + 1) * packed_tiles / parts});
      }
    size += double(own.to - own.from) * inputs * own.outputs;
  }
  team.run(pieces.size(), size, [&](int i) {
    const Piece& piece = pieces[i];
    const Product<Number>& own = products[piece.product];
    multiply_packed(x, tiles, piece.first, piece.last, own.packed, piece.begin, piece.end, inputs, own.out,
                    own.outputs);
    if (own.finish)
      own.finish(tiles.first(piece.first), tiles.first(piece.last), piece.begin * kPackedWidth,
                 std::min(piece.end * kPackedWidth, own.outputs));
  });
}

// out [rows, outputs] = x [rows, inputs] times a packed kernel. Only bfloat16 is multiplied as that.
template <class X, class Number>
void matmul(Team& team, const X* x, int rows, const Number* packed, int outputs, int inputs, float* out) {
  using As = std::conditional_t<std::is_same_v<X, Number>, Factor<X>, float>;
  thread_local Scratch scratch;
  As* transposed = reinterpret_cast<As*>(scratch.of(size_t(rows) * inputs));
  const Tiles tiles(rows);
  team.run(tiles.count, 2.0 * rows * inputs, [&](int i) {
    const int first = tiles.first(i);
    transpose([&](int m) { return x + size_t(first + m) * inputs; }, tiles.rows(i), inputs,
              transposed + size_t(first) * inputs, tiles.rows(i));
  });
  multiply<As, Number>(team, transposed, tiles, inputs, {{packed, outputs, out, {}, 0, rows}});
}

}  // namespace apt
