// All layers of a step in one call: what `apt_jax.models.opt.DecoderLayer` and `apt_jax.attention.paged` do, with
// padding left out. Numbers are rounded to the model's type at the same places.
//
// Tokens of a row are processed one by one, as rows of a decode step, or together: one by one, tokens are multiplied with
// the cache as it lies, which neighbours read once, and absorb Wk and Wv; together, hidden vectors are projected once. Both
// give the same but for the last digits. Few tokens are processed one by one. But where vectors are rounded to codes,
// another last digit may give another code, so with codes and in float32 a prompt's tokens are always processed together
// and generated ones one by one: what a token gets then depends on what came before it alone, not on where chunks end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "absorption.h"
#include "attention.h"
#include "chunk.h"
#include "matmul.h"
#include "memory.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kNeighbours = 8;      // tokens that share a read of their row's cache
constexpr int kChunkTokens = 16;    // from which on a KV row's tokens are processed together, without codes
constexpr float kProjectionShare = 0.6f;  // what a multiplication of a projection takes, of one in attention
constexpr int kHiddenAtOnce = 64;   // tokens of hidden rows one by one, or the step's rows if they are more
constexpr int kKeysPacked = 4096;   // at a time, if one request has not more

// A layer's parameters; null: the model does not have it. Kernels are packed, see matmul.h.
template <class Number>
struct Layer {
  const Number *attention_scale, *attention_bias;
  Kernel q;
  const Number* q_bias;
  Kernel k;
  const Number* k_bias;
  Kernel v;
  const Number* v_bias;
  Kernel out;
  const Number *out_bias, *final_scale, *final_bias;
  Kernel fc1;
  const Number* fc1_bias;
  Kernel fc2;
  const Number* fc2_bias;

  bool has_codes() const {
    return any([](const Kernel& own) { return own.is_codes(); });
  }

  // Whether rows are rounded to codes for some kernel.
  bool rounds() const {
    return any([](const Kernel& own) { return own.form == Form::kAllCodes; });
  }

 private:
  template <class Is>
  bool any(const Is& is) const {
    return is(q) || is(k) || is(v) || is(out) || is(fc1) || is(fc2);
  }
};

struct StepShape {
  int rows, width, ffn, heads, blocks, page_tokens, pages;  // width: D; blocks: of a layer; pages: of a row's table
  bool norm_first;

  int head_dim() const { return width / heads; }
};

// As `apt_jax.batching.arrays.Rows`: a row of length 0 is padding.
struct StepRows {
  const int32_t *start, *length, *prompt, *last, *wanted, *key_or_hidden_blocks, *value_blocks;
  const bool* is_hidden;
};

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

// The cache's pool: numbers `[layers * blocks, page_tokens, width]`. Beside codes their scales `[layers * blocks,
// scale_row]`, see apt_jax/attention/pool.py.
template <class Cached>
struct Pool {
  Cached* numbers;
  float* scales = nullptr;
  int scale_row = 0;
  const float* channels = nullptr;  // [2, layers, width]; null: no vectors are hidden
  uint32_t* outside = nullptr;      // counts numbers outside their channel's range; null: not to be counted
};

// Centre and width of a layer's channels, or nulls.
struct Channels {
  const float *centre = nullptr, *width = nullptr;
};

// The layers for some tokens, whose residual stream it holds. The pool holds Number or codes.
template <class Number, class Cached>
class Step {
  static constexpr bool kCodes = std::is_same_v<Cached, int8_t>;

 public:
  // `codes`: some kernels are codes; `rounds`: some numbers are rounded to codes on the way.
  Step(Team& team, const StepShape& shape, const StepRows& rows, const Pool<Cached>& pool, int layers, bool codes,
       bool rounds)
      : team_(team), shape_(shape), pool_(pool), layers_(layers) {
    // of a row's tokens, the first ones that are processed together
    const auto of_chunk = [&](int r) {
      const int length = rows.length[r];
      if (rounds && std::is_same_v<Number, float>) return std::min(rows.prompt[r], length);
      return is_chunk(rows, r) ? length : 0;
    };
    const auto add = [&](bool hidden, bool together) {
      for (int r = 0; r < shape.rows; r++) {
        if (rows.is_hidden[r] != hidden) continue;
        const int chunk = of_chunk(r);
        if (together && chunk) add_chunk({tokens() - num_single_, chunk, rows.start[r]}, hidden, tables_of(rows, r));
        add_tokens(rows, r, together ? 0 : chunk, together ? chunk : rows.length[r]);
      }
      return tokens();
    };
    num_hidden_ = add(true, false);
    num_single_ = add(false, false);
    end_of_kv_ = add(false, true);
    add(true, true);
    tiles_ = Tiles(tokens());
    const size_t D = shape.width, n = tokens();
    hidden_at_once_ = std::min(num_hidden_, std::max(shape.rows, kHiddenAtOnce));
    const size_t wide = size_t(hidden_at_once_) * shape.heads * D;
    size_t projected = 0;
    for (const Group& group : groups_) projected = std::max(projected, group.projected.size());
    using Transposed = Operands<Factor<Number>>;
    const int most = codes ? 5 : 1;  // for q, and keys and values of both kinds of rows
    const size_t sizes[] = {Transposed::size(n, D, most), Transposed::size(n, shape.ffn, 1),
                            Transposed::size(projected, D, codes ? 2 : 1)};
    float* memory = nullptr;
    size_t used = 0;
    const auto next = [&](size_t size) {
      float* own = memory ? memory + used : nullptr;
      used += whole_lines(size);
      return own;
    };
    const auto lay_out = [&] {
      stream_ = next(n * D), normed_ = next(n * D), transposed_ = Transposed(next(sizes[0]), n, D);
      q_ = next(n * D), k_ = next(n * D), v_ = next(n * D);
      hidden_k_ = codes ? next(n * D) : k_, hidden_v_ = codes ? next(n * D) : v_;
      attended_ = next(n * D), added_ = next(n * D);
      inner_ = next(n * shape.ffn), inner_transposed_ = Transposed(next(sizes[1]), n, shape.ffn);
      wide_ = reinterpret_cast<Factor<Number>*>(next(wide)), wide_found_ = next(wide), lse_ = next(n * shape.heads);
      prefix_transposed_ = Transposed(next(sizes[2]), projected, D);
      prefix_k_ = next(projected * D), prefix_v_ = next(projected * D);
    };
    lay_out();  // how much there is
    memory = memory_.of(std::exchange(used, 0));
    lay_out();
  }

  // x [tokens with padding, width].
  void start(const Number* x) {
    const size_t D = shape_.width;
    each_token(2.0 * D, [&](int t) {
      for (size_t i = 0; i < D; i++) stream_[t * D + i] = to_float(x[tokens_[t].index * D + i]);
    });
  }

  void finish(Number* x) const {
    const size_t D = shape_.width;
    each_token(2.0 * D, [&](int t) {
      for (size_t i = 0; i < D; i++) from_float(stream_[t * D + i], x + tokens_[t].index * D + i);
    });
  }

  // Layer number l.
  void run(const Layer<Number>& own, int l) {
    const int D = shape_.width, F = shape_.ffn, n = tokens();
    const float scale = 1 / std::sqrt(float(shape_.head_dim()));
    const auto add_to_stream = [&](const Number* bias) {
      return [=, this](int first, int last, int begin, int end) {
        for (int t = first; t < last; t++)
          for (int i = begin; i < end; i++) {
            float& own = stream_[size_t(t) * D + i];
            own = rounded<Number>(own + biased(added_[size_t(t) * D + i], bias, i));
          }
      };
    };

    std::vector<Product> products{{own.q, D, q_, with_bias(q_, own.q_bias, scale), 0, n}};
    add_keys_values(products, own, kCodes ? end_of_kv_ : n);  // one by one, hidden rows need none
    enter(shape_.norm_first, own.attention_scale, own.attention_bias, products);
    multiply<Number>(team_, transposed_, tiles_, products);
    write(l);
    attend_hidden(own, l);
    attend_kv(l);
    for (const Group& group : groups_) attend_group(group, own, l);
    products = {{own.out, D, added_, add_to_stream(own.out_bias), 0, n}};
    transposed_.choose(products);
    each_tile(8.0 * D, [&](int tile) {
      if constexpr (sizeof(Number) < sizeof(float))
        for (size_t i = size_t(tiles_.first(tile)) * D; i < size_t(tiles_.first(tile + 1)) * D; i++)
          attended_[i] = rounded<Number>(attended_[i]);
      transpose_tile(tile, attended_);
    });
    multiply<Number>(team_, transposed_, tiles_, products);
    if (!shape_.norm_first) norm_stream(own.attention_scale, own.attention_bias);

    const auto relu = [bias = own.fc1_bias](float x, int i) {
      const float inner = biased(x, bias, i);
      return inner < 0 ? 0 : inner;  // NaN stays NaN
    };
    std::vector<Product> outer{{own.fc2, D, added_, add_to_stream(own.fc2_bias), 0, n}};
    inner_transposed_.choose(outer);
    // `number` has no condition for each number, or the compiler takes them one by one.
    const auto put_inner = [&](int first, int last, int begin, int end) {
      const auto put = [&](const auto& number) {
        for (int t = first; t < last;) {
          const int rows = tiles_.rows(tiles_.of(t));
          inner_transposed_.put_numbers(
              0, size_t(t) * padded(F) + size_t(begin) * rows,
              [&](int m) { return inner_ + size_t(t + m) * F + begin; }, rows, end - begin, number,
              end == F ? padded(F) - begin : 0);
          t += rows;
        }
      };
      if (const float* factor = own.fc2.factor)
        put([=](float x, int i) { return relu(x, begin + i) * factor[begin + i]; });
      else
        put([=](float x, int i) { return relu(x, begin + i); });
    };
    const bool puts_codes = own.fc2.form == Form::kAllCodes;  // they need a row's greatest number first
    products = {{own.fc1, F, inner_, {}, 0, n}};
    if (!puts_codes) products[0].finish = put_inner;
    enter(shape_.norm_first, own.final_scale, own.final_bias, products);
    multiply<Number>(team_, transposed_, tiles_, products);
    if (puts_codes)
      each_tile(8.0 * F, [&](int tile) {
        for (int t = tiles_.first(tile); t < tiles_.first(tile + 1); t++)
          for (int i = 0; i < F; i++) inner_[size_t(t) * F + i] = relu(inner_[size_t(t) * F + i], i);
        inner_transposed_.put(tiles_, tile, rows_of(inner_, tiles_.first(tile), F));
      });
    multiply<Number>(team_, inner_transposed_, tiles_, outer);
    if (!shape_.norm_first) norm_stream(own.final_scale, own.final_bias);
  }

  // Of layer number l only what is cached.
  void cache(const Layer<Number>& own, int l) {
    std::vector<Product> products;
    add_keys_values(products, own, end_of_kv_);
    enter(shape_.norm_first, own.attention_scale, own.attention_bias, products);
    multiply<Number>(team_, transposed_, tiles_, products);
    write(l);
  }

 private:
  struct Token {
    size_t index;  // in x
    int position;
    const int32_t *keys_or_hidden, *values;  // its row's block tables; values is null for a hidden row
  };

  // A place in a layer's blocks: block and token inside.
  struct Place {
    int32_t block, inside;
  };

  struct Owner {
    bool hidden;
    const int32_t *keys_or_hidden, *values;  // block tables
    size_t projected;  // of the group's, the first of a hidden chunk's prefix; of codes, and the chunk itself
  };

  // Chunks that are attended to together.
  struct Group {
    std::vector<Chunk> chunks;  // begin counts from the first token of any chunk
    std::vector<Owner> owners;
    std::vector<Place> projected;  // cached hidden vectors: what later reads see
    int keys = 0;
  };

  int tokens() const { return tokens_.size(); }

  // Its block tables, of keys or hidden vectors and of values; null for the values of a hidden row.
  std::pair<const int32_t*, const int32_t*> tables_of(const StepRows& rows, int r) const {
    const size_t at = size_t(r) * shape_.pages;
    return {rows.key_or_hidden_blocks + at, rows.is_hidden[r] ? nullptr : rows.value_blocks + at};
  }

  // A row's tokens `[begin, end)`.
  void add_tokens(const StepRows& rows, int r, int begin, int end) {
    const auto [keys_or_hidden, values] = tables_of(rows, r);
    for (int t = begin; t < end; t++) {
      tokens_.push_back({size_t(rows.last[r] - rows.length[r] + 1 + t), rows.start[r] + t, keys_or_hidden, values});
      context_.push_back(rows.start[r] + t + 1);
    }
  }

  // Whether a row's tokens are processed together. Then all its keys and values are packed, and its hidden vectors are
  // projected: L H multiplications for each number of D, where n tokens that absorb take n (H + L).
  bool is_chunk(const StepRows& rows, int r) const {
    const float tokens = rows.length[r], keys = rows.start[r] + tokens, H = shape_.head_dim();
    if (!rows.is_hidden[r]) return tokens >= kChunkTokens;
    return tokens * (H + keys) >= kProjectionShare * keys * H;
  }

  // Of the tokens `[begin, end)`, which are processed one by one, those of a row side by side.
  std::vector<Neighbours> neighbours(int begin, int end) const {
    std::vector<Neighbours> found;
    for (int t = begin; t < end; t++)
      if (t > begin && tokens_[t].keys_or_hidden == tokens_[t - 1].keys_or_hidden && found.back().count < kNeighbours)
        found.back().count++;
      else
        found.push_back({t - begin, 1});
    return found;
  }

  void add_chunk(const Chunk& chunk, bool hidden, std::pair<const int32_t*, const int32_t*> tables) {
    if (groups_.empty() || groups_.back().keys + chunk.keys() > kKeysPacked) groups_.emplace_back();
    Group& group = groups_.back();
    group.chunks.push_back(chunk);
    group.owners.push_back({hidden, tables.first, tables.second, group.projected.size()});
    group.keys += chunk.keys();
    for (int t = 0; hidden && t < (kCodes ? chunk.keys() : chunk.prefix); t++)
      group.projected.push_back({tables.first[t / shape_.page_tokens], t % shape_.page_tokens});
  }

  // Block number `block` of a layer, of all layers' blocks.
  size_t block_of(int l, int block) const { return size_t(l) * shape_.blocks + block; }

  Pages<Cached> pages_of(int l) const {
    const size_t first = block_of(l, 0);
    return {pool_.numbers + first * shape_.page_tokens * shape_.width,
            kCodes ? pool_.scales + first * pool_.scale_row : nullptr, pool_.scale_row};
  }

  Channels channels_of(int l) const {
    if (!pool_.channels) return {};
    const size_t D = shape_.width;
    return {pool_.channels + l * D, pool_.channels + (layers_ + l) * D};
  }

  // Keys and values of the tokens `[num_hidden_, end)`. Those of hidden rows are multiplied with rows as they are: what is
  // absorbed is, too, and results must not depend on which of both a token meets.
  void add_keys_values(std::vector<Product>& products, const Layer<Number>& own, int end) const {
    const auto add = [&](const Kernel& kernel, const Number* bias, float* out, float* hidden_out) {
      const bool parts = kernel.form == Form::kAllCodes;
      const int border = parts ? std::min(end_of_kv_, end) : end;
      if (num_hidden_ < border)
        products.push_back({kernel, shape_.width, out, with_bias(out, bias), num_hidden_, border});
      if (border < end)
        products.push_back({kernel.with(Form::kCodes), shape_.width, hidden_out, with_bias(hidden_out, bias), border, end});
    };
    add(own.k, own.k_bias, k_, hidden_k_), add(own.v, own.v_bias, v_, hidden_v_);
  }

  static float biased(float x, const Number* bias, int i) {
    const float own = rounded<Number>(x);
    return bias ? rounded<Number>(own + to_float(bias[i])) : own;
  }

  // What finishes a product `out [.., D]`.
  auto with_bias(float* out, const Number* bias, float factor = 1) const {
    return [=, D = shape_.width](int first, int last, int begin, int end) {
      for (int t = first; t < last; t++)
        for (int i = begin; i < end; i++) {
          float& own = out[size_t(t) * D + i];
          own = biased(own, bias, i);
          if (factor != 1.0f) own = rounded<Number>(own * factor);
        }
    };
  }

  template <class Work>
  void each_tile(double size_of_token, const Work& work) const {
    team_.run(tiles_.count, size_of_token * tokens(), work);
  }

  template <class Work>
  void each_token(double size, const Work& work) const {
    each_tile(size, [&](int tile) {
      for (int t = tiles_.first(tile); t < tiles_.first(tile + 1); t++) work(t);
    });
  }

  // `normed_`, and in `transposed_` the same in tiles for the products to come.
  void enter(bool norm, const Number* scale, const Number* bias, std::vector<Product>& products) {
    const int D = shape_.width;
    transposed_.choose(products);
    each_tile(16.0 * D, [&](int tile) {
      for (int t = tiles_.first(tile); t < tiles_.first(tile + 1); t++) {
        const float* from = stream_ + size_t(t) * D;
        if (norm)
          normalize(from, scale, bias, D, normed_ + size_t(t) * D);
        else
          std::copy_n(from, D, normed_ + size_t(t) * D);
      }
      transpose_tile(tile, normed_);
    });
  }

  static auto rows_of(const float* x, int first, int size) {
    return [=](int m) { return x + size_t(first + m) * size; };
  }

  void transpose_tile(int tile, const float* x) const {
    transposed_.put(tiles_, tile, rows_of(x, tiles_.first(tile), shape_.width));
  }

  void norm_stream(const Number* scale, const Number* bias) {
    const int D = shape_.width;
    each_token(8.0 * D,
               [&](int t) { normalize(stream_ + size_t(t) * D, scale, bias, D, stream_ + size_t(t) * D); });
  }

  // This step's vectors into their blocks.
  void write(int l) {
    const int D = shape_.width, N = shape_.heads, S = shape_.page_tokens;
    const Channels channels = channels_of(l);
    each_token(8.0 * D, [&](int t) {
      const Token& own = tokens_[t];
      const auto put = [&](const float* from, const int32_t* blocks, bool hidden) {
        const size_t block = block_of(l, blocks[own.position / S]), inside = own.position % S;
        Cached* to = pool_.numbers + (block * S + inside) * D;
        from += size_t(t) * D;
        if constexpr (!kCodes) {
          for (int i = 0; i < D; i++) from_float(from[i], to + i);
        } else {
          float* scales = pool_.scales + block * pool_.scale_row + inside;
          const float whole = hidden ? put_hidden(from, channels, to) : 0;
          for (int n = 0; n < N; n++)
            scales[n * S] = hidden ? whole : encode(from + n * (D / N), D / N, to + n * (D / N));
        }
      };
      put(own.values ? k_ : normed_, own.keys_or_hidden, !own.values);
      if (own.values) put(v_, own.values, false);
    });
  }

  // Codes of a hidden vector relative to its channels, whose scale it returns.
  float put_hidden(const float* h, const Channels& channels, int8_t* to) const {
    thread_local Scratch scratch;
    const int D = shape_.width;
    float* relative = scratch.of(D);
    uint32_t outside = 0;
    for (int i = 0; i < D; i++) {
      relative[i] = (h[i] - channels.centre[i]) / channels.width[i];
      outside += std::fabs(relative[i]) > kLargestCode * (1 + 1e-6f);
    }
    if (outside && pool_.outside) std::atomic_ref<uint32_t>(*pool_.outside).fetch_add(outside);
    return encode(relative, D, to);
  }

  Shape attention_shape(int rows) const { return {rows, shape_.heads, shape_.width, shape_.page_tokens}; }

  void attend_kv(int l) {
    const int first = num_hidden_, count = num_single_ - num_hidden_;
    const size_t at = size_t(first) * shape_.width;
    if (!count) return;
    kv_decode(team_, attention_shape(count), neighbours(first, num_single_), q_ + at, pages_of(l),
              [&](int r) { return tokens_[first + r].keys_or_hidden; },
              [&](int r) { return tokens_[first + r].values; }, context_.data() + first, attended_ + at, lse_);
  }

  void attend_hidden(const Layer<Number>& own, int l) {
    const Channels channels = channels_of(l);
    for (int first = 0; first < num_hidden_; first += hidden_at_once_) {
      const Shape shape = attention_shape(std::min(hidden_at_once_, num_hidden_ - first));
      const size_t at = size_t(first) * shape_.width;
      absorb<Number>(team_, shape, q_ + at, own.k, channels.width, wide_);
      hidden_decode<Factor<Number>>(team_, shape, neighbours(first, first + shape.rows), wide_, pages_of(l),
                                    [&](int r) { return tokens_[first + r].keys_or_hidden; }, context_.data() + first,
                                    wide_found_, lse_);
      multiply_values(team_, shape, wide_found_, own.v, own.v_bias, channels.centre, channels.width, attended_ + at);
    }
  }

  // Keys and values of a group's cached hidden vectors.
  void project(const Group& group, const Layer<Number>& own, int l) {
    const int D = shape_.width, rows = group.projected.size();
    if (!rows) return;
    const Shape shape = attention_shape(0);
    const Pages<Cached> pages = pages_of(l);
    const Channels channels = channels_of(l);
    const Tiles tiles(rows);
    const auto kernel = [](const Kernel& of) { return of.is_codes() ? of.with(Form::kCodes) : of; };
    std::vector<Product> products{{kernel(own.k), D, prefix_k_, with_bias(prefix_k_, own.k_bias), 0, rows},
                                  {kernel(own.v), D, prefix_v_, with_bias(prefix_v_, own.v_bias), 0, rows}};
    prefix_transposed_.choose(products);
    team_.run(tiles.count, 8.0 * rows * D, [&](int i) {
      const auto place = [&](int m) { return group.projected[tiles.first(i) + m]; };
      if constexpr (!kCodes) {
        prefix_transposed_.put(tiles, i, [&](int m) { return pages.at(shape, place(m).block, place(m).inside); });
      } else {
        thread_local Scratch scratch;
        float* vectors = scratch.of(size_t(kTallest) * D);
        for (int m = 0; m < tiles.rows(i); m++) {
          const auto [block, inside] = place(m);
          const int8_t* codes = pages.at(shape, block, inside);
          const float scale = *pages.scales_at(shape, block, inside);
          for (int d = 0; d < D; d++)
            vectors[size_t(m) * D + d] = rounded<Number>(channels.centre[d] + channels.width[d] * (codes[d] * scale));
        }
        prefix_transposed_.put(tiles, i, rows_of(vectors, 0, D));
      }
    });
    multiply<Number>(team_, prefix_transposed_, tiles, products);
  }

  void attend_group(const Group& group, const Layer<Number>& own, int l) {
    const int D = shape_.width, S = shape_.page_tokens, H = shape_.head_dim();
    project(group, own, l);
    const Shape shape = attention_shape(0);
    const Pages<Cached> pages = pages_of(l);
    const size_t at = size_t(num_single_) * D;
    using X = Factor<Number>;
    attend_chunks<X>(team_, group.chunks, q_ + at, shape_.heads, H, attended_ + at, nullptr,
                  [&](int c, int n, X* keys, X* values) {
                    const Chunk& chunk = group.chunks[c];
                    const Owner& owner = group.owners[c];
                    const auto pack = [&](const auto& row_of_keys, const auto& row_of_values) {
                      pack_keys(chunk.keys(), H, row_of_keys, keys);
                      pack_values(chunk.keys(), H, row_of_values, values);
                    };
                    const auto paged = [&](const int32_t* blocks) {
                      return [=](int t) {
                        const Cached* numbers = pages.at(shape, blocks[t / S], t % S) + n * H;
                        if constexpr (kCodes)
                          return Scaled{numbers, pages.scales_at(shape, blocks[t / S], t % S)[n * S]};
                        else
                          return numbers;
                      };
                    };
                    const auto projected = [&](const float* prefix, const float* now) {
                      prefix += owner.projected * D + n * H;
                      now += at + size_t(chunk.begin) * D + n * H;
                      return [=, cached_tokens = kCodes ? chunk.keys() : chunk.prefix](int t) {
                        return t < cached_tokens ? prefix + size_t(t) * D : now + size_t(t - cached_tokens) * D;
                      };
                    };
                    if (owner.hidden)
                      pack(projected(prefix_k_, hidden_k(own)), projected(prefix_v_, hidden_v(own)));
                    else
                      pack(paged(owner.keys_or_hidden), paged(owner.values));
                  });
  }

  // Of hidden rows' chunks, see `add_keys_values`.
  const float* hidden_k(const Layer<Number>& own) const { return own.k.form == Form::kAllCodes ? hidden_k_ : k_; }
  const float* hidden_v(const Layer<Number>& own) const { return own.v.form == Form::kAllCodes ? hidden_v_ : v_; }

  Team& team_;
  const StepShape shape_;
  const Pool<Cached> pool_;
  const int layers_;
  // First those of hidden rows that are taken one by one, then of such KV rows, of KV rows' chunks, of hidden rows' chunks.
  std::vector<Token> tokens_;
  std::vector<int32_t> context_;  // by token: cached tokens, itself included
  std::vector<Group> groups_;
  int num_hidden_ = 0, num_single_ = 0, end_of_kv_ = 0;  // tokens of the first, the first two, the first three of these
  int hidden_at_once_ = 0;
  Tiles tiles_{0};
  Borrowed memory_;
  float *stream_, *normed_, *q_, *k_, *v_, *hidden_k_, *hidden_v_, *attended_, *added_, *inner_;
  Factor<Number>* wide_;       // [hidden_at_once_, heads, D]
  float *wide_found_, *lse_;
  float *prefix_k_, *prefix_v_;
  Operands<Factor<Number>> transposed_, inner_transposed_, prefix_transposed_;
};

// x [tokens with padding, width], all layers one after the other. Of the last one, tokens that are not among the wanted
// last ones of their rows get nothing but their place in the cache; theirs in x is what came before it.
template <class Number, class Cached>
void all_layers(Team& team, const StepShape& shape, const StepRows& rows, const std::vector<Layer<Number>>& layers,
                const Pool<Cached>& pool, Number* x) {
  std::vector<int32_t> start(shape.rows), length(shape.rows), prompt(shape.rows);
  bool all = true;
  for (int r = 0; r < shape.rows; r++) {
    length[r] = std::min(rows.wanted[r], rows.length[r]);
    const int before = rows.length[r] - length[r];
    start[r] = rows.start[r] + before, prompt[r] = std::max(rows.prompt[r] - before, 0);
    all &= length[r] == rows.length[r];
  }
  const int count = layers.size(), whole = all ? count : count - 1;
  const auto has = [&](const auto& any) { return std::any_of(layers.begin(), layers.end(), any); };
  const bool codes = has([](const auto& own) { return own.has_codes(); });
  const bool rounds = std::is_same_v<Cached, int8_t> || has([](const auto& own) { return own.rounds(); });
  Step<Number, Cached> step(team, shape, rows, pool, count, codes, rounds);
  step.start(x);
  for (int l = 0; l < whole; l++) step.run(layers[l], l);
  if (!all) step.cache(layers[whole], whole);
  step.finish(x);
  if (all) return;
  StepRows wanted = rows;
  wanted.start = start.data(), wanted.length = length.data(), wanted.prompt = prompt.data();
  Pool<Cached> written = pool;
  written.outside = nullptr;  // counted above
  Step<Number, Cached> last(team, shape, wanted, written, count, codes, rounds);
  last.start(x);
  last.run(layers[whole], whole);
  last.finish(x);
}

// In layers_*.cc, which are compiled at the same time.
extern template void all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<float>>&,
                                const Pool<float>&, float*);
extern template void all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<BFloat16>>&,
                                const Pool<BFloat16>&, BFloat16*);
extern template void all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<float>>&,
                                const Pool<int8_t>&, float*);
extern template void all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<BFloat16>>&,
                                const Pool<int8_t>&, BFloat16*);

}  // namespace apt
