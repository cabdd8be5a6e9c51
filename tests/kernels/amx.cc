// Products of `apt_jax/cpu_kernels/amx.h` with its instructions in software, so that any x86 processor runs them.
// Exit 0: they are those of plain loops, and no instruction was given registers of shapes that the processor refuses.
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// The registers: of each the rows and bytes that were configured, and its bytes. "Intel 64 and IA-32 Architectures Software
// Developer's Manual", volume 1, chapter 18 says what they refuse.
struct Register {
  int rows = 0, bytes = 0;
  uint8_t at[16][64];
};
thread_local Register registers[8];
thread_local long products = 0;

void load_config(const void* config) {
  uint8_t own[64];
  std::memcpy(own, config, sizeof own);
  require(own[0] == 1, "palette 1 is the only one");
  for (int i = 1; i < 16; i++) require(own[i] == 0, "reserved bytes are 0");
  for (int i = 0; i < 8; i++) {
    uint16_t bytes;
    std::memcpy(&bytes, own + 16 + 2 * i, sizeof bytes);
    require(bytes <= 64 && own[48 + i] <= 16, "a register has at most 16 rows of 64 bytes");
    require((bytes == 0) == (own[48 + i] == 0), "a register has both rows and bytes or neither");
    registers[i].rows = own[48 + i], registers[i].bytes = bytes;
    std::memset(registers[i].at, 0, sizeof registers[i].at);
  }
}

void release() {
  for (Register& own : registers) own.rows = own.bytes = 0;
}

Register& known(int i) {
  require(registers[i].rows > 0, "a register was used that is not configured");
  return registers[i];
}

void load_register(int i, const void* from, size_t step) {
  Register& own = known(i);
  for (int row = 0; row < own.rows; row++)
    std::memcpy(own.at[row], static_cast<const char*>(from) + row * step, own.bytes);
}

void store_register(int i, void* to, size_t step) {
  const Register& own = known(i);
  for (int row = 0; row < own.rows; row++) std::memcpy(static_cast<char*>(to) + row * step, own.at[row], own.bytes);
}

void zero_register(int i) { std::memset(known(i).at, 0, sizeof known(i).at); }

float widened(uint16_t number) {
  const uint32_t bits = uint32_t(number) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// to += x times y: for each four bytes of a row of x a row of y. `add(sum, bytes of x, bytes of y)`.
template <class Sum, class Add>
void multiply(int to, int x, int y, const Add& add) {
  Register &sums = known(to), &left = known(x), &right = known(y);
  require(sums.rows == left.rows && sums.bytes == right.bytes && left.bytes / 4 == right.rows,
          "shapes of a product's registers do not fit");
  require(to != x && to != y && x != y, "a product's registers are three");
  for (int m = 0; m < sums.rows; m++)
    for (int k = 0; k < left.bytes; k += 4)
      for (int n = 0; n < sums.bytes; n += 4) {
        Sum sum;
        std::memcpy(&sum, &sums.at[m][n], sizeof sum);
        sum = add(sum, &left.at[m][k], &right.at[k / 4][n]);
        std::memcpy(&sums.at[m][n], &sum, sizeof sum);
      }
  products++;
}

void multiply_numbers(int to, int x, int y) {
  multiply<float>(to, x, y, [](float sum, const uint8_t* a, const uint8_t* b) {
    uint16_t left[2], right[2];
    std::memcpy(left, a, sizeof left);
    std::memcpy(right, b, sizeof right);
    return sum + widened(left[0]) * widened(right[0]) + widened(left[1]) * widened(right[1]);
  });
}

void multiply_codes(int to, int x, int y) {
  multiply<int32_t>(to, x, y, [](int32_t sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; i++) sum += int32_t(int8_t(a[i])) * int8_t(b[i]);
    return sum;
  });
}

}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig load_config
#define _tile_release release
#define _tile_loadd load_register
#define _tile_stored store_register
#define _tile_zero zero_register
#define _tile_dpbf16ps multiply_numbers
#define _tile_dpbssd multiply_codes
#if !defined(__AMX_TILE__)
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif
#include "../../apt_jax/cpu_kernels/products.h"
// after what declares them
#include "../../apt_jax/cpu_kernels/amx.cc"

#include <cmath>
#include <random>
#include <vector>

// of those in matmul*.cc what rows take that AMX leaves
template void apt::multiply_packed(const BFloat16*, const Tiles&, int, int, const BFloat16*, const Scales&, int, int, int,
                                   float*, int, const char*);
template void apt::multiply_packed(const BFloat16*, const Tiles&, int, int, const int8_t*, const Scales&, int, int, int,
                                   float*, int, const char*);
template void apt::multiply_packed(const int8_t*, const Tiles&, int, int, const int8_t*, const Scales&, int, int, int,
                                   float*, int, const char*);

namespace {

using namespace apt;

std::mt19937 random_bits(0);

template <class Number>
Number number() {
  Number out;
  if constexpr (std::is_same_v<Number, int8_t>)
    out = int8_t(int(random_bits() % 255) - 127);
  else
    from_float(float(int(random_bits() % 2001) - 1000) / 1000, &out);
  return out;
}

double to_double(int8_t x) { return x; }
double to_double(BFloat16 x) { return to_float(x); }

// Rows of bfloat16 times a kernel of Number: sums of threads' pieces against plain loops in double.
template <class Number>
void check(Form form, int rows, int inputs, int outputs) {
  constexpr int kWide = kInStep<Number>;
  const bool codes = form == Form::kAllCodes;
  const int steps = (inputs + kWide - 1) / kWide, tiles_of_kernel = packed_tiles(outputs);
  Aligned<Number> packed(size_t(tiles_of_kernel) * steps * kWide * kPackedWidth);
  for (Number& own : packed) own = number<Number>();
  const auto at = [&](int input, int output) {
    const size_t step = size_t(output / kPackedWidth) * steps + input / kWide;
    return packed[(step * kPackedWidth + output % kPackedWidth) * kWide + input % kWide];
  };
  Aligned<BFloat16> x(size_t(rows) * inputs);
  for (BFloat16& own : x) own = number<BFloat16>();
  Aligned<float> scale(size_t(tiles_of_kernel) * kPackedWidth, 0.01f);
  for (int i = 0; i < outputs; i++) scale[i] = 0.01f * float(1 + i % 5);
  const float kUntouched = 12345;
  Aligned<float> out(size_t(rows) * outputs + kPackedWidth, kUntouched);
  Team team(1, [](Team::Task) {});
  const long before = products;
  matmul<BFloat16, BFloat16>(team, x.data(), rows, Kernel{form, packed.data(), scale.data()}, outputs, inputs, out.data());
  require((products > before) == (inputs % (codes ? 64 : 32) == 0 && (!codes || rows >= kRowsOfCodes)),
          "it is used where inputs fill blocks, and only there");
  for (int m = 0; m < rows; m++) {
    std::vector<float> row(inputs);
    for (int i = 0; i < inputs; i++) row[i] = to_float(x[size_t(m) * inputs + i]);
    float unit = 1;
    if (codes) {
      const RowScale own(greatest_magnitude(row.data(), inputs));
      std::vector<int8_t> as_codes(inputs);
      encode(row.data(), inputs, own.factor, as_codes.data());
      std::copy_n(as_codes.data(), inputs, row.data());
      unit = own.scale;
    }
    for (int n = 0; n < outputs; n++) {
      double sum = 0, size = 0;
      for (int i = 0; i < inputs; i++) {
        const double product = double(row[i]) * to_double(at(i, n));
        sum += product, size += std::abs(product);
      }
      const double factor = form == Form::kNumbers ? 1 : double(unit) * scale[n];
      const double tolerance = factor * (codes ? 3e-7 * std::abs(sum) : 1e-6 * size);
      if (std::abs(out[size_t(m) * outputs + n] - factor * sum) > tolerance) {
        std::fprintf(stderr, "form %d, row %d of %d, output %d of %d, %d inputs: %g instead of %g\n", int(form), m, rows, n,
                     outputs, inputs, out[size_t(m) * outputs + n], factor * sum);
        std::_Exit(1);
      }
    }
  }
  for (int i = 0; i < kPackedWidth; i++) require(out[size_t(rows) * outputs + i] == kUntouched, "written past the last row");
}

}  // namespace

int main() {
  amx_is_used = true;
  for (const int rows : {1, 2, 3, 14, 15, 16, 28, 29, 57, 150})
    for (const auto& [inputs, outputs] : {std::pair{64, 7}, {96, 32}, {768, 96}, {1600, 33}, {3072, 50}}) {
      check<BFloat16>(Form::kNumbers, rows, inputs, outputs);
      check<int8_t>(Form::kCodes, rows, inputs, outputs);
      check<int8_t>(Form::kAllCodes, rows, inputs, outputs);
    }
}
