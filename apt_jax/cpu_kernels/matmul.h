// x [rows, inputs] times a kernel in panels `[outputs / kPanel, inputs, kPanel]`, zeros where outputs end.
//
// A panel is read from its begin to its end, so the memory can be asked for it ahead; a tile of rows multiplies it with
// no sum across a vector. A result is the sum over inputs in their order, for any number of rows.
#pragma once

#include <algorithm>

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
constexpr int kRowsOfBlock = 128;       // rows that share a panel while it is near
constexpr int kNumbersAtOnce = 131072;  // of x: half of the second cache

// Row tiles of about the same height: the first `taller` have one row more.
struct Tiles {
  int count, height, taller;

  explicit Tiles(int rows)
      : count((rows + kTallest - 1) / kTallest), height(rows / count), taller(rows % count) {}
  int first(int i) const { return i * height + std::min(i, taller); }
  int rows(int i) const { return height + (i < taller); }
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

// Panels `[begin, end)` for the rows of one block: x as `turn` leaves it.
template <class Number>
void few_panels(const float* x, const Tiles& tiles, int rows, const Number* panels, int begin, int end, int inputs,
                float* out, int outputs) {
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
        const size_t share = size_t(steps) * kPanel * sizeof(Number) / tiles.count;
        for (int i = 0; i < tiles.count; i++) {
          const int m = tiles.first(i), height = tiles.rows(i), known = std::min(kPanel, outputs - p * kPanel);
          const float* own_x = x + size_t(m) * inputs + size_t(at) * height;
          const char* ahead = reinterpret_cast<const char*>(next) + i * share;
          float* own_out = out + size_t(m) * outputs + p * kPanel;
          if (known == kPanel) {
            panel_tile_of(height, own_x, own, steps, own_out, outputs, at > 0, ahead, share / steps);
            continue;
          }
          if (at > 0)
            for (int r = 0; r < height; r++) std::copy_n(own_out + size_t(r) * outputs, known, edge + r * kPanel);
          panel_tile_of(height, own_x, own, steps, edge, kPanel, at > 0, ahead, share / steps);
          for (int r = 0; r < height; r++) std::copy_n(edge + r * kPanel, known, own_out + size_t(r) * outputs);
        }
      }
    }
}

// x [rows, inputs] -> out [inputs, rows], a part at a time: rows may be as far apart as is bad for the first cache.
inline void turn(const float* x, int rows, int inputs, float* out) {
  constexpr int kPart = 64;
  for (int from = 0; from < inputs; from += kPart)
    for (int m = 0; m < rows; m++)
      for (int i = from; i < std::min(from + kPart, inputs); i++) out[size_t(i) * rows + m] = x[size_t(m) * inputs + i];
}

// out [rows, outputs].
template <class Number>
void matmul(Team& team, const float* x, int rows, const Number* panels, int outputs, int inputs,
                     float* out) {
  const int blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock, num_panels = (outputs + kPanel - 1) / kPanel;
  const double products = double(rows) * inputs * outputs;
  const auto first_of = [&](int block) { return int(int64_t(block) * rows / blocks); };
  if (rows > 1) {
    thread_local Scratch scratch;
    float* turned = scratch.of(size_t(rows) * inputs);
    const Tiles most((rows + blocks - 1) / blocks);
    team.run(blocks * most.count, 2.0 * rows * inputs, [&](int i) {
      const int first = first_of(i / most.count), own = i % most.count;
      const Tiles tiles(first_of(i / most.count + 1) - first);
      if (own >= tiles.count) return;
      const size_t at = size_t(first + tiles.first(own)) * inputs;
      turn(x + at, tiles.rows(own), inputs, turned + at);
    });
    x = turned;
  }
  const int parts = std::min<int>(num_panels, (blocks > 1 ? 2 : 6) * team.threads());
  team.run(blocks * parts, products, [&](int i) {
    const int first = first_of(i % blocks), count = first_of(i % blocks + 1) - first, part = i / blocks;
    few_panels(x + size_t(first) * inputs, Tiles(count), count, panels, part * num_panels / parts,
               (part + 1) * num_panels / parts, inputs, out + size_t(first) * outputs, outputs);
  });
}

}  // namespace apt
