// Products of the same rows with kernels of the model's type or of codes, their pieces shared by threads.
#pragma once

#include <algorithm>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "amx.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"

namespace apt {

enum class Form {
  kNumbers,   // of the model's type
  kCodes,     // multiplied with rows as they are
  kAllCodes,  // multiplied with rows that are codes too
};

// A packed kernel: `factor * codes * scale`, if it is codes.
struct Kernel {
  Form form;
  const void* packed;
  const float* scale = nullptr;   // of each output
  const float* factor = nullptr;  // of each input, a power of two; or null

  template <class Number>
  const Number* as() const {
    return static_cast<const Number*>(packed);
  }
  // Where a packed tile begins; numbers are of Number.
  template <class Number>
  const char* packed_tile(int number, int inputs) const {
    constexpr int kWide = kInStep<Number>;
    const size_t of_output = is_codes() ? padded(inputs) : (inputs + kWide - 1) / kWide * kWide * sizeof(Number);
    return static_cast<const char*>(packed) + number * of_output * kPackedWidth;
  }
  bool is_codes() const { return form != Form::kNumbers; }
  Kernel with(Form other) const { return {other, packed, scale, factor}; }
};

struct Product {
  Kernel kernel;
  int outputs;
  float* out;  // [rows, outputs]
  // What is to be done with its rows `[first, last)`, outputs `[begin, end)`: finish(first, last, begin, end), or none.
  std::function<void(int, int, int, int)> finish;
  int from, to;  // rows that are wanted; others may be left out
  int operand = 0;
};

// Rows `[rows, inputs]` in tiles, as some kernels want them: as X or as codes, times a factor for each input or not.
template <class X>
class Operands {
 public:
  Operands() = default;
  // `memory` is for `most` of them.
  Operands(float* memory, size_t rows, int inputs) : memory_(memory), rows_(rows), inputs_(inputs) {}

  // float32 that they take.
  static size_t size(size_t rows, int inputs, int most) { return most * rows * padded(inputs); }

  // Chooses the operand of each product; `put` is to follow.
  void choose(std::vector<Product>& products) {
    kinds_.clear();
    for (Product& own : products) {
      const Kind kind{own.kernel.form == Form::kAllCodes, own.kernel.factor};
      own.operand = std::find(kinds_.begin(), kinds_.end(), kind) - kinds_.begin();
      if (own.operand == int(kinds_.size())) kinds_.push_back(kind);
    }
  }

  // Tile i of rows `row(m) [inputs]`, m counting from the tile's first, as all operands.
  template <class Row>
  void put(const Tiles& tiles, int i, const Row& row) const {
    const int first = tiles.first(i), rows = tiles.rows(i);
    const size_t at = size_t(first) * padded(inputs_);
    for (size_t which = 0; which < kinds_.size(); which++) {
      const float* factor = kinds_[which].factor;
      if (kinds_[which].as_codes)
        as_wide<int8_t>([&]<int kWide>(Wide<kWide>) {
          transpose_codes<kWide>(row, rows, inputs_, factor, codes(which) + at, scales(which) + first,
                                 begins(which) + first);
        });
      else if (factor)
        put_numbers(which, at, row, rows, inputs_, [=](auto found, int i) { return to_float(found) * factor[i]; },
                    padded(inputs_));
      else
        put_numbers(which, at, row, rows, inputs_, [](auto found, int) { return to_float(found); }, padded(inputs_));
    }
  }

  // `rows` rows of numbers of a tile, `number(row(m)[i], i)`, from place `at` of an operand on; see `transpose`.
  template <class Row, class Make>
  void put_numbers(int which, size_t at, const Row& row, int rows, int inputs, const Make& number, int end) const {
    as_wide<X>([&]<int kWide>(Wide<kWide>) {
      transpose<kWide>(row, rows, inputs, numbers(which) + at, rows, number, end);
    });
  }

  int rows() const { return rows_; }
  int inputs() const { return inputs_; }
  X* numbers(int which) const { return reinterpret_cast<X*>(memory(which)); }
  int8_t* codes(int which) const { return reinterpret_cast<int8_t*>(memory(which)); }
  float* scales(int which) const { return memory(which) + rows_ * padded(inputs_) / 4; }
  int32_t* begins(int which) const { return reinterpret_cast<int32_t*>(scales(which) + rows_); }

 private:
  struct Kind {
    bool as_codes;
    const float* factor;

    bool operator==(const Kind&) const = default;
  };

  template <int kWide>
  using Wide = std::integral_constant<int, kWide>;

  // `work` with the number of adjacent inputs of a row of From.
  template <class From, class Work>
  void as_wide(const Work& work) const {
    if (takes_blocks<From>(inputs_, rows_))
      work(Wide<kInBlock<From>>{});
    else
      work(Wide<kInStep<From>>{});
  }

  float* memory(int which) const { return memory_ + which * rows_ * padded(inputs_); }

  float* memory_ = nullptr;
  size_t rows_ = 0;
  int inputs_ = 0;
  std::vector<Kind> kinds_;
};

// In matmul*.cc, which are compiled at the same time.
extern template void multiply_packed(const float*, const Tiles&, int, int, const float*, const Scales&, int, int, int,
                                     float*, int, const char*);
extern template void multiply_packed(const float*, const Tiles&, int, int, const BFloat16*, const Scales&, int, int, int,
                                     float*, int, const char*);
extern template void multiply_packed(const BFloat16*, const Tiles&, int, int, const BFloat16*, const Scales&, int, int, int,
                                     float*, int, const char*);
extern template void multiply_packed(const float*, const Tiles&, int, int, const int8_t*, const Scales&, int, int, int,
                                     float*, int, const char*);
extern template void multiply_packed(const BFloat16*, const Tiles&, int, int, const int8_t*, const Scales&, int, int, int,
                                     float*, int, const char*);
extern template void multiply_packed(const int8_t*, const Tiles&, int, int, const int8_t*, const Scales&, int, int, int,
                                     float*, int, const char*);

// Packed tiles `[begin, end)` of a product's kernel for the tiles `[first, last)`; Number is the model's type. `after` is what
// this thread is likely to read next, or null.
template <class Number, class X>
void multiply_part(const Operands<X>& x, const Tiles& tiles, int first, int last, const Product& own, int begin, int end,
                   const char* after) {
  const Kernel& kernel = own.kernel;
  const int which = own.operand, inputs = x.inputs();
  const auto multiply = [&]<class From>(const From* rows, const auto* packed, const Scales& scales) {
    if constexpr (!std::is_same_v<From, float>)
      if (takes_blocks<From>(inputs, x.rows()))
        return multiply_packed_blocks(rows, tiles, first, last, packed, scales, begin, end, inputs, own.out, own.outputs);
    multiply_packed(rows, tiles, first, last, packed, scales, begin, end, inputs, own.out, own.outputs, after);
  };
  switch (kernel.form) {
    case Form::kNumbers:
      return multiply(x.numbers(which), kernel.as<Number>(), {});
    case Form::kCodes:
      return multiply(x.numbers(which), kernel.as<int8_t>(), {kernel.scale, 1 / kWidened});
    case Form::kAllCodes:
      return multiply(x.codes(which), kernel.as<int8_t>(), {kernel.scale, 1, x.scales(which), x.begins(which)});
  }
}

// Products of the same x; Number is the model's type.
template <class Number, class X>
void multiply(Team& team, const Operands<X>& x, const Tiles& tiles, const std::vector<Product>& products) {
  struct Piece {
    int product, first, last, begin, end;  // tiles of rows, packed tiles
  };
  const int blocks = (tiles.count + kTilesOfBlock - 1) / kTilesOfBlock, threads = team.threads();
  std::vector<Piece> pieces;
  double size = 0;
  int left = 0;  // packed tiles
  for (const Product& own : products) left += packed_tiles(own.outputs);
  for (size_t which = 0; which < products.size(); which++) {
    const Product& own = products[which];
    const int count = packed_tiles(own.outputs), parts = std::min(count, 2 * threads);
    // Few rows are read once: pieces become smaller, so that no thread waits long for the last one.
    for (int begin = 0, part = 1, end; begin < count; left -= end - begin, begin = end, part++) {
      end = blocks > 1 ? part * count / parts : std::min(begin + std::max(left / (2 * threads), 1), count);
      for (int block = 0; block < blocks; block++) {
        const int first = block * tiles.count / blocks, last = (block + 1) * tiles.count / blocks;
        if (tiles.first(last) > own.from && tiles.first(first) < own.to)
          pieces.push_back({int(which), first, last, begin, end});
      }
    }
    size += double(own.to - own.from) * x.inputs() * own.outputs;
  }
  const auto start_of = [&](size_t i) -> const char* {
    if (i >= pieces.size()) return nullptr;
    return products[pieces[i].product].kernel.template packed_tile<Number>(pieces[i].begin, x.inputs());
  };
  team.run(pieces.size(), size, [&](int i) {
    const Piece& piece = pieces[i];
    const Product& own = products[piece.product];
    multiply_part<Number>(x, tiles, piece.first, piece.last, own, piece.begin, piece.end, start_of(i + threads));
    if (own.finish)
      own.finish(tiles.first(piece.first), tiles.first(piece.last), piece.begin * kPackedWidth,
                 std::min(piece.end * kPackedWidth, own.outputs));
  });
}

// out [rows, outputs] = x [rows, inputs] times a packed kernel of Number or of codes. Rows are multiplied as `As`.
template <class As, class Number, class From>
void matmul(Team& team, const From* x, int rows, const Kernel& kernel, int outputs, int inputs, float* out) {
  thread_local Scratch scratch;
  std::vector<Product> products{{kernel, outputs, out, {}, 0, rows}};
  Operands<As> operands(scratch.of(Operands<As>::size(rows, inputs, 1)), rows, inputs);
  operands.choose(products);
  const Tiles tiles(rows);
  team.run(tiles.count, 2.0 * rows * inputs, [&](int i) {
    operands.put(tiles, i, [&](int m) { return x + size_t(tiles.first(i) + m) * inputs; });
  });
  multiply<Number>(team, operands, tiles, products);
}

}  // namespace apt
