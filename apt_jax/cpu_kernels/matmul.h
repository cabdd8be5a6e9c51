// x [rows, inputs] times a kernel in panels `[outputs / kPanel, inputs, kPanel]`, zeros where outputs end.
//
// A panel is read from its begin to its end, so the memory can be asked for it ahead; a tile of rows multiplies it with
// no sum across a vector. A result is the sum over inputs in their order, for any number of rows.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kPanel = 32;  // outputs; as PANEL in calls.py
constexpr int kVectors = kPanel / kLanes;
#if defined(__AVX512F__)
constexpr int kTallest = 14;  // rows of a tile: 28 of 32 registers are sums
#else
constexpr int kTallest = 3;
#endif
constexpr int kInputsAtOnce = 768;      // of a panel, between which sums go to memory
constexpr int kTilesOfBlock = (128 + kTallest - 1) / kTallest;  // that share a panel while it is near
constexpr int kNumbersAtOnce = 131072;  // of a block: half of the second cache
constexpr int kTilesToWiden = 4;        // from which on a panel of bfloat16 is made float32 for all of them at once

// Row tiles of about the same height: the first `taller` have one row more. Of rows in tiles, `[rows, inputs]`, each tile
// is turned round: `[inputs, rows of the tile]`.
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

// out [M, kPanel] (+)= x [steps, M] turned round, times panel [steps, kPanel]. Meanwhile brings `ahead` bytes a step
// from `next` nearer.
template <int M, class Number>
__attribute__((noinline)) void panel_tile(const float* x, const Number* panel, int steps, float* out, size_t out_step,
                                          bool adds, const char* next, int ahead) {
  Vector sums[M][kVectors] = {};
  if (adds)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sums[m][v] = load(out + m * out_step + v * kLanes);
  for (int i = 0; i < steps; i++, x += M, panel += kPanel, next += ahead) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + ahead / 2, 0, 2);
    Vector own[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) own[v] = load_as_float(panel + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sums[m][v] += x[m] * own[v];
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) store(out + m * out_step + v * kLanes, sums[m][v]);
}

template <class Number, int M = kTallest>
inline void panel_tile_of(int rows, const float* x, const Number* panel, int steps, float* out, size_t out_step,
                          bool adds, const char* next, int ahead) {
  if constexpr (M > 1)
    if (rows < M) return panel_tile_of<Number, M - 1>(rows, x, panel, steps, out, out_step, adds, next, ahead);
  panel_tile<M>(x, panel, steps, out, out_step, adds, next, ahead);
}

// Panels `[begin, end)` for the tiles `[first, last)`: x in tiles, out [rows, outputs].
template <class Number>
void few_panels(const float* x, const Tiles& tiles, int first, int last, const Number* panels, int begin, int end,
                int inputs, float* out, int outputs) {
  const int rows = tiles.first(last) - tiles.first(first);
  const int depth = std::max(kNumbersAtOnce / rows / kInputsAtOnce, 1) * kInputsAtOnce;
  alignas(64) float edge[kTallest * kPanel];
  for (int from = 0; from < inputs; from += depth)
    for (int p = begin; p < end; p++) {
      const int to = std::min(from + depth, inputs);
      for (int at = from; at < to; at += kInputsAtOnce) {
        const int steps = std::min(kInputsAtOnce, to - at);
        const Number* own = panels + (size_t(p) * inputs + at) * kPanel;
        const Number* next = at + steps < to ? own + size_t(steps) * kPanel
                                             : panels + (size_t(p + 1) * inputs + from) * kPanel;
        const size_t share = size_t(steps) * kPanel * sizeof(Number) / (last - first);
        const auto all_tiles = [&](const auto* panel) {
          for (int i = first; i < last; i++) {
            const int m = tiles.first(i), height = tiles.rows(i), known = std::min(kPanel, outputs - p * kPanel);
            const float* own_x = x + size_t(m) * inputs + size_t(at) * height;
            const char* ahead = reinterpret_cast<const char*>(next) + (i - first) * share;
            float* own_out = out + size_t(m) * outputs + p * kPanel;
            if (known == kPanel) {
              panel_tile_of(height, own_x, panel, steps, own_out, outputs, at > 0, ahead, share / steps);
              continue;
            }
            if (at > 0)
              for (int r = 0; r < height; r++) std::copy_n(own_out + size_t(r) * outputs, known, edge + r * kPanel);
            panel_tile_of(height, own_x, panel, steps, edge, kPanel, at > 0, ahead, share / steps);
            for (int r = 0; r < height; r++) std::copy_n(edge + r * kPanel, known, own_out + size_t(r) * outputs);
          }
        };
        if (sizeof(Number) < sizeof(float) && last - first >= kTilesToWiden) {
          alignas(64) thread_local float widened[kInputsAtOnce * kPanel];
          for (int i = 0; i < steps * kPanel; i += kLanes) store(widened + i, load_as_float(own + i));
          all_tiles(widened);
        } else {
          all_tiles(own);
        }
      }
    }
}

// out [inputs, rows], its columns `out_step` numbers long, of `row(m)[i]`, a part at a time: rows may be as far apart as
// is bad for the first cache. `number` makes a float32 of what is found, `number(found, i)`.
template <class Row, class Make>
inline void turn(const Row& row, int rows, int inputs, float* out, int out_step, const Make& number) {
  constexpr int kPart = 64;
  for (int from = 0; from < inputs; from += kPart)
    for (int m = 0; m < rows; m++) {
      const auto* own = row(m);
      for (int i = from; i < std::min(from + kPart, inputs); i++) out[size_t(i) * out_step + m] = number(own[i], i);
    }
}

template <class Row>
inline void turn(const Row& row, int rows, int inputs, float* out, int out_step) {
  turn(row, rows, inputs, out, out_step, [](auto found, int) { return to_float(found); });
}

template <class Number>
struct Product {
  const Number* panels;
  int outputs;
  float* out;  // [rows, outputs]
  // What is to be done with its rows `[first, last)`, outputs `[begin, end)`: finish(first, last, begin, end), or none.
  std::function<void(int, int, int, int)> finish;
  int from, to;  // rows that are wanted; others may be left out
};

// Products of the same x [rows, inputs], which is in tiles.
template <class Number>
void multiply(Team& team, const float* x, const Tiles& tiles, int inputs, const std::vector<Product<Number>>& products) {
  struct Piece {
    int product, first, last, begin, end;  // tiles and panels
  };
  const int blocks = (tiles.count + kTilesOfBlock - 1) / kTilesOfBlock;
  const int most_parts = (blocks > 1 ? 2 : 6) * team.threads();
  std::vector<Piece> pieces;
  double size = 0;
  for (size_t which = 0; which < products.size(); which++) {
    const Product<Number>& own = products[which];
    const int panels = (own.outputs + kPanel - 1) / kPanel, parts = std::min(panels, most_parts);
    for (int part = 0; part < parts; part++)
      for (int block = 0; block < blocks; block++) {
        const int first = block * tiles.count / blocks, last = (block + 1) * tiles.count / blocks;
        if (tiles.first(last) > own.from && tiles.first(first) < own.to)
          pieces.push_back({int(which), first, last, part * panels / parts, (part + 1) * panels / parts});
      }
    size += double(own.to - own.from) * inputs * own.outputs;
  }
  team.run(pieces.size(), size, [&](int i) {
    const Piece& piece = pieces[i];
    const Product<Number>& own = products[piece.product];
    few_panels(x, tiles, piece.first, piece.last, own.panels, piece.begin, piece.end, inputs, own.out, own.outputs);
    if (own.finish)
      own.finish(tiles.first(piece.first), tiles.first(piece.last), piece.begin * kPanel,
                 std::min(piece.end * kPanel, own.outputs));
  });
}

// out [rows, outputs] = x [rows, inputs] times panels.
template <class Number>
void matmul(Team& team, const float* x, int rows, const Number* panels, int outputs, int inputs, float* out) {
  thread_local Scratch scratch;
  float* turned = scratch.of(size_t(rows) * inputs);
  const Tiles tiles(rows);
  team.run(tiles.count, 2.0 * rows * inputs, [&](int i) {
    const int first = tiles.first(i);
    turn([&](int m) { return x + size_t(first + m) * inputs; }, tiles.rows(i), inputs, turned + size_t(first) * inputs,
         tiles.rows(i));
  });
  multiply<Number>(team, turned, tiles, inputs, {{panels, outputs, out, {}, 0, rows}});
}

}  // namespace apt
