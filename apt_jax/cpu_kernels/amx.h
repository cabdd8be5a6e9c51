// Products of bfloat16, and of codes, by AMX: tile registers of 16 rows of 64 bytes. Intel's server processors have it
// since Sapphire Rapids, and it takes an eighth of the time of AVX-512.
//
// Where it is used for bfloat16 it is used for any number of rows, since its sums are rounded in another order. Those of
// codes are exact.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "matmul.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define APT_AMX 1
#endif

namespace apt {

constexpr int kRowsOfCodes = 16;  // from which on it is faster than VNNI

// Inputs of a row that fill a row of a register.
template <class X>
constexpr int kInBlock = 64 / int(sizeof(X));

#if defined(APT_AMX)
inline std::atomic<bool> amx_is_used{false};

// Uses AMX from now on, or not; whether it is used. The system must permit it to the process first.
inline bool use_amx(bool wanted) {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const bool used = wanted && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  amx_is_used.store(used, std::memory_order_relaxed);
  return used;
}

// Whether rows of x are multiplied so; they lie in blocks then: `[inputs / kInBlock, rows of a tile, kInBlock]`.
template <class X>
bool takes_blocks(int inputs, int rows) {
  if (!amx_is_used.load(std::memory_order_relaxed) || inputs % kInBlock<X>) return false;
  return std::is_same_v<X, BFloat16> || (std::is_same_v<X, int8_t> && rows >= kRowsOfCodes);
}

// The registers for sums of two tiles of x and two halves of a packed tile, in this thread until it is gone.
class Registers {
 public:
  Registers() = default;
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
  ~Registers() { _tile_release(); }

  void shape(int rows, int more_rows) {
    if (rows == rows_ && more_rows == more_rows_) return;
    rows_ = rows, more_rows_ = more_rows;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int each[] = {rows, rows, more_rows, more_rows, rows, more_rows, 16, 16};
    for (int i = 0; i < 8; i++)
      if (each[i]) config.bytes[i] = 64, config.rows[i] = each[i];
    _tile_loadconfig(&config);
  }

 private:
  int rows_ = 0, more_rows_ = 0;
};

// Sums of the first tile of x in registers 0 and 1, of the second in 2 and 3: plus the products of register 4, or 5, with
// the halves of a packed tile, 6 and 7. Compilers want numbers of registers written out.
template <class X>
inline void add_products_of_first() {
  if constexpr (std::is_same_v<X, BFloat16>) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  } else {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
}

template <class X>
inline void add_products_of_second() {
  if constexpr (std::is_same_v<X, BFloat16>) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  } else {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

// A tile of x, its blocks, and where its sums go.
template <class X>
struct Side {
  int rows;
  const X* x;
  float* out;
};

// out [rows, kPackedWidth] (+)= blocks of one tile of x, or of two, times those of a packed tile; sums of codes are int32.
template <bool kTwo, class X>
__attribute__((noinline)) void multiply_blocks(const Side<X>& first, const Side<X>& second, const X* packed_tile,
                                               int blocks, size_t out_step, bool adds, const char* next, int ahead) {
  constexpr int kHalf = kPackedWidth / 2;
  constexpr size_t kPackedStep = 2 * 64;  // bytes of a packed tile's step: both halves
  const size_t step = out_step * sizeof(float);
  asm volatile("" ::: "memory");  // the compiler does not know that the instructions read memory
  if (adds) {
    _tile_loadd(0, first.out, step);
    _tile_loadd(1, first.out + kHalf, step);
    if constexpr (kTwo) {
      _tile_loadd(2, second.out, step);
      _tile_loadd(3, second.out + kHalf, step);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const char* packed = reinterpret_cast<const char*>(packed_tile);
  for (int i = 0; i < blocks; i++, packed += 16 * kPackedStep, next += ahead) {
    for (int line = 0; line < ahead; line += 64) __builtin_prefetch(next + line, 0, 2);
    _tile_loadd(4, first.x + size_t(i) * first.rows * kInBlock<X>, 64);
    _tile_loadd(6, packed, kPackedStep);
    _tile_loadd(7, packed + 64, kPackedStep);
    add_products_of_first<X>();
    if constexpr (kTwo) {
      _tile_loadd(5, second.x + size_t(i) * second.rows * kInBlock<X>, 64);
      add_products_of_second<X>();
    }
  }
  _tile_stored(0, first.out, step);
  _tile_stored(1, first.out + kHalf, step);
  if constexpr (kTwo) {
    _tile_stored(2, second.out, step);
    _tile_stored(3, second.out + kHalf, step);
  }
  asm volatile("" ::: "memory");
}

// Sums in out [rows, kPackedWidth] to results.
template <class X>
void scale_sums(float* out, size_t out_step, int rows, const Scales& scales) {
  for (int m = 0; m < rows; m++)
    for (int lane = 0; lane < kPackedWidth; lane += kLanes) {
      float* to = out + m * out_step + lane;
      if constexpr (std::is_same_v<X, int8_t>) {
        Whole sums;
        std::memcpy(&sums, to, sizeof sums);
        store(to, to_floats(sums) * scales.of_rows[m] * load(scales.of_outputs + lane));
      } else {
        store(to, load(to) * (load(scales.of_outputs + lane) * scales.unit));
      }
    }
}

// As `multiply_packed`, with x in blocks.
template <class X, class Number>
void multiply_packed_blocks(const X* x, const Tiles& tiles, int first, int last, const Number* packed,
                            const Scales& scales, int begin, int end, int inputs, float* out, int outputs) {
  constexpr int kBlocksAtOnce = 24;  // of a packed tile, 48 KiB
  constexpr int kBlocksAhead = 4;
  constexpr bool kWidens = !std::is_same_v<X, Number>;
  const int all_blocks = inputs / kInBlock<X>;
  const size_t packed_block = size_t(kInBlock<X>) * kPackedWidth;
  alignas(64) float edge[2 * kTallest * kPackedWidth];
  Registers registers;
  for (int p = begin; p < end; p++) {
    const int known = std::min(kPackedWidth, outputs - p * kPackedWidth);
    for (int at = 0; at < all_blocks; at += kBlocksAtOnce) {
      const int blocks = std::min(kBlocksAtOnce, all_blocks - at);
      const bool ends = at + blocks == all_blocks;
      const Number* own = packed + (size_t(p) * all_blocks + at) * packed_block;
      const int pairs = (last - first + 1) / 2;
      // one pair reads all once, so what it needs soon is what comes soon
      const char* next = reinterpret_cast<const char*>(own + (pairs > 1 ? blocks : kBlocksAhead) * packed_block);
      if (p == begin && at == 0)
        for (size_t byte = 0; byte < kBlocksAhead * packed_block * sizeof(Number); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(own) + byte, 0, 2);
      const X* packed_tile;
      if constexpr (kWidens) {
        alignas(64) thread_local X room[kBlocksAtOnce * kInBlock<X> * kPackedWidth];
        packed_tile = widen(own, blocks * kInBlock<X>, room);
      } else {
        packed_tile = own;
      }
      const int ahead = int(packed_block * sizeof(Number)) / pairs;
      for (int i = first; i < last; i += 2) {
        const bool two = i + 1 < last;
        const auto side = [&](int tile) {
          const int m = tiles.first(tile), rows = tiles.rows(tile);
          float* to = out + size_t(m) * outputs + p * kPackedWidth;
          return Side<X>{rows, x + size_t(m) * padded(inputs) + size_t(at) * kInBlock<X> * rows, to};
        };
        Side<X> sides[] = {side(i), two ? side(i + 1) : Side<X>{}};
        size_t out_step = outputs;
        const auto each_known = [&](const auto& work) {  // of rows whose outputs end inside of the packed tile
          for (int which = 0; which <= two; which++)
            for (int m = 0; m < sides[which].rows; m++)
              work(out + size_t(tiles.first(i + which) + m) * outputs + p * kPackedWidth,
                   edge + (which * kTallest + m) * kPackedWidth);
        };
        if (known < kPackedWidth) {
          sides[0].out = edge, sides[1].out = edge + kTallest * kPackedWidth, out_step = kPackedWidth;
          if (at) each_known([&](const float* own, float* room) { std::copy_n(own, known, room); });
        }
        registers.shape(sides[0].rows, sides[1].rows);
        const char* ahead_of_pair = next + size_t(i - first) / 2 * ahead * blocks;
        if (two)
          multiply_blocks<true>(sides[0], sides[1], packed_tile, blocks, out_step, at > 0, ahead_of_pair, ahead);
        else
          multiply_blocks<false>(sides[0], sides[1], packed_tile, blocks, out_step, at > 0, ahead_of_pair, ahead);
        if (ends && scales.of_outputs)
          for (int which = 0; which <= two; which++)
            scale_sums<X>(sides[which].out, out_step, sides[which].rows,
                          scales.at(tiles.first(i + which), p * kPackedWidth, true));
        if (known < kPackedWidth)
          each_known([&](float* own, const float* room) { std::copy_n(room, known, own); });
      }
    }
  }
}

// In amx.cc, compiled by itself.
extern template void multiply_packed_blocks(const BFloat16*, const Tiles&, int, int, const BFloat16*, const Scales&, int,
                                            int, int, float*, int);
extern template void multiply_packed_blocks(const BFloat16*, const Tiles&, int, int, const int8_t*, const Scales&, int,
                                            int, int, float*, int);
extern template void multiply_packed_blocks(const int8_t*, const Tiles&, int, int, const int8_t*, const Scales&, int,
                                            int, int, float*, int);
#else
inline bool use_amx(bool) { return false; }

template <class X>
bool takes_blocks(int, int) {
  return false;
}

template <class X, class Number>
void multiply_packed_blocks(const X*, const Tiles&, int, int, const Number*, const Scales&, int, int, int, float*, int) {}
#endif

}  // namespace apt
