// All layers of a decode step in one call: what `apt_jax.opt.DecoderLayer` and `apt_jax.attention` do with one token of
// each request, with rows of padding left out. Numbers are rounded to the model's own type where they are there.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

// A layer's parameters; null is one that the model does not have. Kernels are in panels.
template <class Number>
struct Layer {
  const Number *attention_scale, *attention_bias, *q, *q_bias, *k, *k_bias, *v, *v_bias, *out, *out_bias;
  const Number *final_scale, *final_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};

struct DecodeShape {
  int rows, width, ffn, heads, blocks, page_tokens, pages;  // width: D; blocks: of a layer; pages: of a row's table
  bool norm_first;

  int head_dim() const { return width / heads; }
};

// Which row is cached where. A row whose length is 0 is padding.
struct DecodeRows {
  const int32_t *start, *length, *first_blocks, *second_blocks;
  const bool* is_hidden;
};

template <class Number>
inline float rounded(float x) {
  Number out;
  from_float(x, &out);
  return to_float(out);
}

// The layer norm of `x [size]`; scale and bias may be null.
template <class Number>
inline void normalize(const float* x, const Number* scale, const Number* bias, int size, float* out) {
  Vector sums{}, squares{};
  const int whole = size / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) sums += load(x + i);
  float mean = sum(sums);
  for (int i = whole; i < size; i++) mean += x[i];
  mean /= size;
  for (int i = 0; i < whole; i += kLanes) {
    const Vector off = load(x + i) - mean;
    squares += off * off;
  }
  float variance = sum(squares);
  for (int i = whole; i < size; i++) variance += (x[i] - mean) * (x[i] - mean);
  const float factor = 1 / std::sqrt(variance / size + 1e-5f);
  for (int i = 0; i < size; i++) {
    const float own = (x[i] - mean) * (scale ? factor * to_float(scale[i]) : factor);
    out[i] = rounded<Number>(bias ? own + to_float(bias[i]) : own);
  }
}

template <class Number>
class DecodeStep {
 public:
  DecodeStep(Team& team, const DecodeShape& shape, const DecodeRows& rows, Number* pool)
      : team_(team), shape_(shape), pool_(pool) {
    for (const bool hidden : {false, true})
      for (int r = 0; r < shape.rows; r++)
        if (rows.length[r] > 0 && rows.is_hidden[r] == hidden) {
          row_.push_back(r);
          first_.push_back(rows.first_blocks + size_t(r) * shape.pages);
          second_.push_back(rows.second_blocks + size_t(r) * shape.pages);
          context_.push_back(rows.start[r] + 1);
          num_kv_ += !hidden;
        }
    n_ = row_.size();
    tiles_ = Tiles(std::max(n_, 1));
    thread_local Scratch scratch;
    const size_t rows_by_width = size_t(n_) * shape.width, wide = size_t(n_ - num_kv_) * shape.heads * shape.width;
    float* at = scratch.of(8 * rows_by_width + 2 * size_t(n_) * shape.ffn + 2 * wide + size_t(n_) * shape.heads);
    const auto next = [&](size_t size) { return std::exchange(at, at + size); };
    stream_ = next(rows_by_width), normed_ = next(rows_by_width), turned_ = next(rows_by_width);
    q_ = next(rows_by_width), k_ = next(rows_by_width), v_ = next(rows_by_width);
    attended_ = next(rows_by_width), added_ = next(rows_by_width);
    inner_ = next(size_t(n_) * shape.ffn), inner_turned_ = next(size_t(n_) * shape.ffn);
    wide_ = next(wide), wide_found_ = next(wide), lse_ = next(size_t(n_) * shape.heads);
  }

  // x [rows, width], all layers one after the other.
  void run(const std::vector<Layer<Number>>& layers, Number* x) {
    const int D = shape_.width;
    for (int r = 0; r < n_; r++)
      for (int i = 0; i < D; i++) stream_[size_t(r) * D + i] = to_float(x[size_t(row_[r]) * D + i]);
    for (size_t l = 0; l < layers.size() && n_ > 0; l++) one(layers[l], l);
    for (int r = 0; r < n_; r++)
      for (int i = 0; i < D; i++) from_float(stream_[size_t(r) * D + i], x + size_t(row_[r]) * D + i);
  }

 private:
  struct Product {
    const Number* panels;
    int outputs;
    float* out;  // [n, outputs]
    std::function<void(int, int)> finish;  // what is to be done with outputs `[begin, end)` of all rows
  };

  void one(const Layer<Number>& own, size_t layer) {
    const int D = shape_.width, F = shape_.ffn;
    const float scale = 1 / std::sqrt(float(shape_.head_dim()));
    Number* pool = pool_ + layer * shape_.blocks * shape_.page_tokens * D;
    const auto biased = [](float x, const Number* bias, int i) {
      const float own = rounded<Number>(x);
      return bias ? rounded<Number>(own + to_float(bias[i])) : own;
    };
    const auto with_bias = [&](float* x, const Number* bias, float factor) {
      return [=, this](int begin, int end) {
        for (int r = 0; r < n_; r++)
          for (int i = begin; i < end; i++) {
            float& own = x[size_t(r) * D + i];
            own = biased(own, bias, i);
            if (factor != 1.0f) own = rounded<Number>(own * factor);
          }
      };
    };
    const auto add_to_stream = [&](const Number* bias) {
      return [=, this](int begin, int end) {
        for (int r = 0; r < n_; r++)
          for (int i = begin; i < end; i++) {
            float& own = stream_[size_t(r) * D + i];
            own = rounded<Number>(own + biased(added_[size_t(r) * D + i], bias, i));
          }
      };
    };

    enter(shape_.norm_first, own.attention_scale, own.attention_bias);
    std::vector<Product> products{{own.q, D, q_, with_bias(q_, own.q_bias, scale)}};
    if (num_kv_) {
      products.push_back({own.k, D, k_, with_bias(k_, own.k_bias, 1)});
      products.push_back({own.v, D, v_, with_bias(v_, own.v_bias, 1)});
    }
    multiply(n_ > 1 ? turned_ : normed_, D, products);
    write(pool);
    attend_kv(pool);
    attend_hidden(own, pool);
    turn_all(attended_, D);
    multiply(n_ > 1 ? turned_ : attended_, D, {{own.out, D, added_, add_to_stream(own.out_bias)}});
    if (!shape_.norm_first) norm_stream(own.attention_scale, own.attention_bias);

    enter(shape_.norm_first, own.final_scale, own.final_bias);
    multiply(n_ > 1 ? turned_ : normed_, D, {{own.fc1, F, inner_, [&](int begin, int end) {
      for (int tile = 0; tile < tiles_.count; tile++) {
        const int m = tiles_.first(tile), height = tiles_.rows(tile);
        for (int r = 0; r < height; r++)
          for (int i = begin; i < end; i++)
            inner_turned_[size_t(m) * F + size_t(i) * height + r] =
                relu(biased(inner_[size_t(m + r) * F + i], own.fc1_bias, i));
      }
    }}});
    multiply(inner_turned_, F, {{own.fc2, D, added_, add_to_stream(own.fc2_bias)}});
    if (!shape_.norm_first) norm_stream(own.final_scale, own.final_bias);
  }

  static float relu(float x) { return x < 0 ? 0 : x; }  // NaN stays NaN

  // `normed_`, and the same turned round if it is more than one row, for the products to come.
  void enter(bool norm, const Number* scale, const Number* bias) {
    const int D = shape_.width;
    each_tile(16.0 * n_ * D, [&](int m, int height) {
      for (int r = m; r < m + height; r++) {
        const float* from = stream_ + size_t(r) * D;
        if (norm)
          normalize(from, scale, bias, D, normed_ + size_t(r) * D);
        else
          std::copy_n(from, D, normed_ + size_t(r) * D);
      }
      if (n_ > 1) turn(normed_ + size_t(m) * D, height, D, turned_ + size_t(m) * D);
    });
  }

  void turn_all(const float* x, int size) {
    if (n_ > 1)
      each_tile(16.0 * n_ * size, [&](int m, int height) {
        turn(x + size_t(m) * size, height, size, turned_ + size_t(m) * size);
      });
  }

  void norm_stream(const Number* scale, const Number* bias) {
    const int D = shape_.width;
    each_tile(8.0 * n_ * D, [&](int m, int height) {
      for (int r = m; r < m + height; r++)
        normalize(stream_ + size_t(r) * D, scale, bias, D, stream_ + size_t(r) * D);
    });
  }

  template <class Work>
  void each_tile(double size, const Work& work) {
    team_.run(tiles_.count, size, [&](int i) { work(tiles_.first(i), tiles_.rows(i)); });
  }

  void multiply(const float* x, int inputs, const std::vector<Product>& products) {
    std::vector<int> first{0};
    double size = 0;
    const auto panels_of = [](const Product& product) { return (product.outputs + kPanel - 1) / kPanel; };
    for (const Product& product : products) {
      first.push_back(first.back() + std::min(panels_of(product), 6 * team_.threads()));
      size += double(n_) * inputs * product.outputs;
    }
    team_.run(first.back(), size, [&](int i) {
      int which = 0;
      while (i >= first[which + 1]) which++;
      const Product& own = products[which];
      const int part = i - first[which], parts = first[which + 1] - first[which], panels = panels_of(own);
      const int begin = part * panels / parts, end = (part + 1) * panels / parts;
      few_panels(x, tiles_, n_, own.panels, begin, end, inputs, own.out, own.outputs);
      own.finish(begin * kPanel, std::min(end * kPanel, own.outputs));
    });
  }

  // This step's vectors into their blocks.
  void write(Number* pool) {
    const int D = shape_.width, S = shape_.page_tokens;
    team_.run(n_, 8.0 * n_ * D, [&](int r) {
      const int position = context_[r] - 1;
      const auto put = [&](const float* from, const int32_t* blocks) {
        Number* to = pool + (size_t(blocks[position / S]) * S + position % S) * D;
        for (int i = 0; i < D; i++) from_float(from[i], to + i);
      };
      put((r < num_kv_ ? k_ : normed_) + size_t(r) * D, first_[r]);
      if (r < num_kv_) put(v_ + size_t(r) * D, second_[r]);
    });
  }

  Shape attention_shape(int rows) const {
    return {rows, shape_.heads, shape_.width, shape_.page_tokens, shape_.pages};
  }

  void attend_kv(const Number* pool) {
    if (!num_kv_) return;
    const int D = shape_.width;
    const Shape shape = attention_shape(num_kv_);
    attend_rows(team_, shape, shape_.head_dim(), context_.data(), attended_, lse_,
                [&](int r, int begin, int end, Running& running) {
                  thread_local std::vector<float> buffer;
                  kv_part(shape, q_ + size_t(r) * D, pool, first_[r], second_[r], begin, end, running, buffer);
                });
    round_attended(0, num_kv_);
  }

  // Source: DESIGN 2.1: queries of D numbers for each head, over the vectors themselves.
  void attend_hidden(const Layer<Number>& own, const Number* pool) {
    const int count = n_ - num_kv_, D = shape_.width, N = shape_.heads, H = shape_.head_dim();
    if (!count) return;
    constexpr int kPart = 256;
    const int parts = (D + kPart - 1) / kPart;
    team_.run(N * parts, 2.0 * count * N * D * H, [&](int i) {
      const int n = i / parts, begin = i % parts * kPart, end = std::min(begin + kPart, D);
      for (int r = 0; r < count; r++)
        absorb(q_ + size_t(num_kv_ + r) * D + size_t(n) * H, own.k + size_t(n) * H * D, begin, end,
               wide_ + (size_t(r) * N + n) * D);
    });
    const Shape shape = attention_shape(count);
    attend_rows(team_, shape, D, context_.data() + num_kv_, wide_found_, lse_,
                [&](int r, int begin, int end, Running& running) {
                  thread_local std::vector<float> buffer;
                  hidden_part(shape, wide_ + size_t(r) * N * D, pool, first_[num_kv_ + r], begin, end, running, buffer);
                });
    const Tiles tiles(count);
    float* out = attended_ + size_t(num_kv_) * D;
    team_.run(N, double(count) * D * D, [&](int n) {
      thread_local Scratch scratch;
      float *rows = scratch.of(2 * size_t(count) * D), *turned = rows + size_t(count) * D;
      for (int r = 0; r < count; r++) std::copy_n(wide_found_ + (size_t(r) * N + n) * D, D, rows + size_t(r) * D);
      for (int tile = 0; tile < tiles.count; tile++) {
        const size_t at = size_t(tiles.first(tile)) * D;
        turn(rows + at, tiles.rows(tile), D, turned + at);
      }
      few_panels(turned, tiles, count, own.v + size_t(n) * H * D, 0, H / kPanel, D, out + n * H, D);
      if (own.v_bias)
        for (int r = 0; r < count; r++)
          for (int i = n * H; i < (n + 1) * H; i++) out[size_t(r) * D + i] += to_float(own.v_bias[i]);
    });
    round_attended(num_kv_, n_);
  }

  // out [begin, end) = the head's panels [head_dim / kPanel, D, kPanel] times its query, for inputs `[begin, end)`.
  void absorb(const float* q, const Number* panels, int begin, int end, float* out) const {
    const int H = shape_.head_dim(), D = shape_.width;
    for (int at = begin; at < end; at += 4) {
      Vector sums[4] = {};
      const int count = std::min(4, end - at);
      for (int j = 0; j < H; j += kPanel)
        for (int i = 0; i < count; i++)
          for (int lane = 0; lane < kPanel; lane += kLanes)
            sums[i] += load(q + j + lane) * load_as_float(panels + size_t(j) * D + size_t(at + i) * kPanel + lane);
      float found[4];
      sum_four(sums[0], sums[1], sums[2], sums[3], found);
      for (int i = 0; i < count; i++) out[at + i] = rounded<Number>(found[i]);
    }
  }

  void round_attended(int begin, int end) {
    if constexpr (sizeof(Number) < sizeof(float))
      for (size_t i = size_t(begin) * shape_.width; i < size_t(end) * shape_.width; i++)
        attended_[i] = rounded<Number>(attended_[i]);
  }

  Team& team_;
  const DecodeShape shape_;
  Number* pool_;
  // of the rows that are no padding, KV rows first
  std::vector<int> row_;
  std::vector<int32_t> context_;  // cached tokens, the new one included
  std::vector<const int32_t*> first_, second_;
  int n_ = 0, num_kv_ = 0;
  Tiles tiles_{1};
  float *stream_, *normed_, *turned_, *q_, *k_, *v_, *attended_, *added_, *inner_, *inner_turned_;
  float *wide_, *wide_found_, *lse_;  // wide: [hidden rows, heads, D]
};

}  // namespace apt
