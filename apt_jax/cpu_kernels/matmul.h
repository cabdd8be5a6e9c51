// x [rows, inputs] times a kernel [outputs, inputs]: each result is a sum of products along memory on both sides.
//
// Few rows are multiplied with the kernel as it lies, which takes as long as reading it. For more, tiles of both sides
// are packed one after the other (and a bfloat16 kernel converted), so that the first cache serves the products. Where
// inputs are a multiple of 2 * kLanes, a row's results do not depend on how many rows there are: the sums are the same.
#pragma once

#include <algorithm>
#include <memory>

#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kPair = 2 * kLanes;
constexpr int kDepth = 768;       // inputs summed in registers: a tile of the kernel stays in the first cache
constexpr int kRowsAtOnce = 128;  // their inputs stay in the second cache
constexpr int kRowsToPack = 16;
constexpr int kOutputsAtOnce = 8 * kTileColumns;

// A part of memory that a tile brings nearer while it computes: `lines` cache lines of each of kTileColumns rows.
struct Ahead {
  const char* at = nullptr;
  size_t row_step = 0;
  int lines = 0;
  int per_step = 0;  // lines to ask for in one step of the tile

  int row = 0, line = 0;

  // The share of tile `i` of `tiles`, each of `steps` steps, in bringing `bytes` of each row at `next`.
  static Ahead share(const void* next, size_t row_step, size_t bytes, int i, int tiles, int steps) {
    const int lines = (bytes + 63) / 64, own = (lines + tiles - 1) / tiles;
    Ahead ahead;
    if (i * own < lines) {
      ahead.at = static_cast<const char*>(next) + size_t(i) * own * 64;
      ahead.row_step = row_step;
      ahead.lines = std::min(own, lines - i * own);
      ahead.per_step = (ahead.lines * kTileColumns + steps - 1) / steps;
    }
    return ahead;
  }

  inline __attribute__((always_inline)) void advance() {
    for (int i = 0; i < per_step && line < lines; i++) {
      __builtin_prefetch(at + row * row_step + line * 64, 0, 2);
      if (++row == kTileColumns) row = 0, line++;
    }
  }
};

// out[m][n] (+)= the sum of sums[m][n].
template <int M, int N>
inline __attribute__((always_inline)) void add_sums(const Vector (&sums)[M][N], float* out, size_t out_step, bool adds) {
  constexpr int kFours = N / 4 * 4;
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    float* to = out + m * out_step;
#pragma GCC unroll 8
    for (int n = 0; n < kFours; n += 4)
      sum_four(sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3], to + n, adds);
#pragma GCC unroll 8
    for (int n = kFours; n < N; n++) to[n] = adds ? to[n] + sum(sums[m][n]) : sum(sums[m][n]);
  }
}

// out[m][n] (+)= x[m] . kernel[n] over `inputs`, both as they lie.
template <int M, int N, class Kernel>
__attribute__((noinline)) void tile(const float* x, size_t x_step, const Kernel* kernel, size_t kernel_step, int inputs,
                                    float* out, size_t out_step, bool adds, Ahead ahead) {
  Vector sums[M][N] = {};
  int at = 0;
  for (; at + kPair <= inputs; at += kPair) {
    ahead.advance();
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      Vector b[2];
      load_pair(kernel + n * kernel_step + at, b[0], b[1]);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][n] += load(x + m * x_step + at) * b[0];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][n] += load(x + m * x_step + at + kLanes) * b[1];
    }
  }
  add_sums<M, N>(sums, out, out_step, adds);
  for (int m = 0; m < M && at < inputs; m++)
    for (int n = 0; n < N; n++)
      for (int i = at; i < inputs; i++) out[m * out_step + n] += x[m * x_step + i] * to_float(kernel[n * kernel_step + i]);
}

template <int N, class Kernel>
inline void tile_of(int rows, const float* x, size_t x_step, const Kernel* kernel, size_t kernel_step, int inputs,
                    float* out, size_t out_step, bool adds, const Ahead& ahead) {
  switch (rows) {
    case 1: return tile<1, N>(x, x_step, kernel, kernel_step, inputs, out, out_step, adds, ahead);
    case 2: return tile<2, N>(x, x_step, kernel, kernel_step, inputs, out, out_step, adds, ahead);
    case 3: return tile<3, N>(x, x_step, kernel, kernel_step, inputs, out, out_step, adds, ahead);
    default: return tile<kTileRows, N>(x, x_step, kernel, kernel_step, inputs, out, out_step, adds, ahead);
  }
}

// out [kTileRows, kTileColumns] (+)= the products of a tile of x and one of the kernel, both packed, of `steps` vectors.
__attribute__((noinline)) inline void packed_tile(const float* x, const float* kernel, int steps, float* out, bool adds,
                                                  Ahead ahead) {
  Vector sums[kTileRows][kTileColumns] = {};
  for (int i = 0; i < steps; i++, x += kTileRows * kLanes, kernel += kTileColumns * kLanes) {
    ahead.advance();
    Vector a[kTileRows];
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; m++) a[m] = load(x + m * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kTileColumns; n++) {
      const Vector b = load(kernel + n * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kTileRows; m++) sums[m][n] += a[m] * b;
    }
  }
  add_sums<kTileRows, kTileColumns>(sums, out, kTileColumns, adds);
}

// `count` of `size` rows, each of `inner` numbers `step` apart, as `[vector][size][kLanes]` of float32; zeros complete
// both. In the order in which `load_pair` brings numbers of Kernel.
template <class Kernel, class Number>
void pack(const Number* from, size_t step, int count, int size, int inner, float* out) {
  for (int at = 0; at < inner; at += kPair, out += 2 * size * kLanes)
    for (int row = 0; row < size; row++) {
      float* first = out + row * kLanes;
      float* second = out + (size + row) * kLanes;
      const Number* own = from + row * step + at;
      if (row < count && at + kPair <= inner) {
        Vector a, b;
        if constexpr (sizeof(Kernel) == sizeof(Number)) {
          load_pair(own, a, b);
        } else {
          for (int i = 0; i < kLanes; i++) a[i] = to_float(own[2 * i]), b[i] = to_float(own[2 * i + 1]);
        }
        store(first, a);
        store(second, b);
      } else {
        const int known = row < count ? inner - at : 0;
        for (int i = 0; i < kPair; i++) {
          float* to = sizeof(Kernel) == 2 ? (i % 2 ? second : first) + i / 2 : (i < kLanes ? first : second) + i % kLanes;
          *to = i < known ? to_float(own[i]) : 0;
        }
      }
    }
}

inline int vectors_of(int inner) { return 2 * ((inner + kPair - 1) / kPair); }

// Few rows of x in parts of kDepth inputs, `[depth][row][kDepth]`, in the order in which `load_pair` brings the kernel's.
template <class Kernel>
void arrange(const float* x, int rows, int inputs, float* out) {
  for (int depth = 0; depth < inputs; depth += kDepth) {
    const int inner = std::min(kDepth, inputs - depth);
    for (int m = 0; m < rows; m++, out += inner) {
      const float* from = x + size_t(m) * inputs + depth;
      int at = 0;
      if constexpr (sizeof(Kernel) == 2)
        for (; at + kPair <= inner; at += kPair)
          for (int i = 0; i < kLanes; i++) {
            out[at + i] = from[at + 2 * i];
            out[at + kLanes + i] = from[at + 2 * i + 1];
          }
      for (; at < inner; at++) out[at] = from[at];
    }
  }
}

// At most kOutputsAtOnce outputs for fewer than kRowsToPack rows: x as `arrange` leaves it.
template <class Kernel>
void few_rows(const float* x, int rows, const Kernel* kernel, int outputs, int inputs, float* out, size_t out_step) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int depth = 0; depth < inputs; depth += kDepth) {
    const int inner = std::min(kDepth, inputs - depth), steps = std::max(inner / kPair, 1);
    for (int n = 0; n < outputs; n += kTileColumns) {
      const int columns = std::min(kTileColumns, outputs - n);
      const Kernel* own = kernel + size_t(n) * inputs + depth;
      for (int m = 0, i = 0; m < rows; m += kTileRows, i++) {
        const int tile_rows = std::min(kTileRows, rows - m);
        const Ahead ahead = Ahead::share(own + size_t(kTileColumns) * inputs, inputs * sizeof(Kernel),
                                         inner * sizeof(Kernel), i, tiles, steps);
        const float* from = x + size_t(depth) * rows + size_t(m) * inner;
        float* to = out + m * out_step + n;
        if (columns == kTileColumns)
          tile_of<kTileColumns>(tile_rows, from, inner, own, inputs, inner, to, out_step, depth > 0, ahead);
        else
          for (int c = 0; c < columns; c++)
            tile_of<1>(tile_rows, from, inner, own + size_t(c) * inputs, inputs, inner, to + c, out_step, depth > 0,
                       Ahead{});
      }
    }
  }
}

// At most kOutputsAtOnce outputs for at most kRowsAtOnce rows: x in packed tiles, depth by depth.
template <class Kernel>
void many_rows(const float* x, int rows, const Kernel* kernel, int outputs, int inputs, float* out, size_t out_step) {
  alignas(64) float found[kOutputsAtOnce * (kRowsAtOnce + kTileRows)];  // [column tile][row][kTileColumns]
  alignas(64) float packed[kTileColumns * (kDepth + kPair)];
  const int tiles = (rows + kTileRows - 1) / kTileRows, padded = tiles * kTileRows;
  for (int depth = 0; depth < inputs; depth += kDepth) {
    const int inner = std::min(kDepth, inputs - depth), steps = vectors_of(inner);
    for (int n = 0; n < outputs; n += kTileColumns) {
      const Kernel* own = kernel + size_t(n) * inputs + depth;
      pack<Kernel>(own, inputs, std::min(kTileColumns, outputs - n), kTileColumns, inner, packed);
      for (int i = 0; i < tiles; i++)
        packed_tile(x + size_t(i) * steps * kTileRows * kLanes, packed, steps,
                    found + n * padded + i * kTileRows * kTileColumns, depth > 0,
                    Ahead::share(own + size_t(kTileColumns) * inputs, inputs * sizeof(Kernel), inner * sizeof(Kernel), i,
                                 tiles, steps));
    }
    x += size_t(tiles) * steps * kTileRows * kLanes;
  }
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < outputs; n++)
      out[m * out_step + n] = found[n / kTileColumns * kTileColumns * padded + m * kTileColumns + n % kTileColumns];
}

// out [rows, outputs] = x [rows, inputs] kernel^T.
template <class Kernel>
void matmul(xla::ffi::ThreadPool& pool, const float* x, int rows, const Kernel* kernel, int outputs, int inputs,
            float* out) {
  const int output_blocks = (outputs + kOutputsAtOnce - 1) / kOutputsAtOnce;
  const double products = double(rows) * inputs * outputs;
  const auto own_outputs = [&](int n) { return std::min(kOutputsAtOnce, outputs - n); };
  if (rows < kRowsToPack) {
    const std::unique_ptr<float[]> arranged(new float[size_t(rows) * inputs]);
    arrange<Kernel>(x, rows, inputs, arranged.get());
    in_parallel(pool, output_blocks, products, [&](int i) {
      const int n = i * kOutputsAtOnce;
      few_rows(arranged.get(), rows, kernel + size_t(n) * inputs, own_outputs(n), inputs, out + n, outputs);
    });
    return;
  }
  const int row_blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  size_t row_size = 0;  // of a packed row
  for (int depth = 0; depth < inputs; depth += kDepth)
    row_size += vectors_of(std::min(kDepth, inputs - depth)) * kLanes;
  const int row_tiles = (rows + kTileRows - 1) / kTileRows;
  const std::unique_ptr<float[]> packed(new float[row_tiles * kTileRows * row_size]);
  const auto block_of = [&](int block) { return packed.get() + size_t(block) * kRowsAtOnce * row_size; };
  const auto own_rows = [&](int block) { return std::min(kRowsAtOnce, rows - block * kRowsAtOnce); };
  constexpr int kTilesAtOnce = 4;
  in_parallel(pool, (row_tiles + kTilesAtOnce - 1) / kTilesAtOnce, double(rows) * inputs, [&](int i) {
    for (int tile = i * kTilesAtOnce; tile < std::min((i + 1) * kTilesAtOnce, row_tiles); tile++) {
      const int block = tile * kTileRows / kRowsAtOnce, own = own_rows(block);
      const int first = tile - block * (kRowsAtOnce / kTileRows), tiles = (own + kTileRows - 1) / kTileRows;
      float* to = block_of(block);
      for (int depth = 0; depth < inputs; depth += kDepth) {
        const int inner = std::min(kDepth, inputs - depth), size = vectors_of(inner) * kTileRows * kLanes;
        const size_t m = size_t(tile) * kTileRows;
        pack<Kernel>(x + m * inputs + depth, inputs, std::min<int>(kTileRows, rows - m), kTileRows, inner,
                     to + size_t(first) * size);
        to += size_t(tiles) * size;
      }
    }
  });
  in_parallel(pool, row_blocks * output_blocks, products, [&](int i) {
    const int block = i % row_blocks, n = i / row_blocks * kOutputsAtOnce;
    many_rows(block_of(block), own_rows(block), kernel + size_t(n) * inputs, own_outputs(n), inputs,
              out + size_t(block) * kRowsAtOnce * outputs + n, outputs);
  });
}

}  // namespace apt
