// All layers of a step in one call: what `apt_jax.models.opt.DecoderLayer` and `apt_jax.attention.paged` do, with
// padding left out. Numbers are rounded to the model's type at the same places.
//
// Rows with few tokens in this step process them one by one, as rows of a decode step, longer rows all together: one by
// one, each token reads the cache for itself and absorbs Wk and Wv; together, hidden vectors are projected once.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "attention.h"
#include "chunk.h"
#include "matmul.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kChunkTokens = 8;     // from which on a row's tokens are processed together
constexpr int kRowsTogether = 8;    // hidden ones, from which on queries of all are made wide at once
constexpr int kKeysPacked = 4096;   // at a time, if one request has not more

// A layer's parameters; null: the model does not have it. Kernels are packed, see matmul.h.
template <class Number>
struct Layer {
  const Number *attention_scale, *attention_bias, *q, *q_bias, *k, *k_bias, *v, *v_bias, *out, *out_bias;
  const Number *final_scale, *final_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};

struct StepShape {
  int rows, width, ffn, heads, blocks, page_tokens, pages;  // width: D; blocks: of a layer; pages: of a row's table
  bool norm_first;

  int head_dim() const { return width / heads; }
};

// As `apt_jax.batching.builder.Rows`: a row of length 0 is padding.
struct StepRows {
  const int32_t *start, *length, *last, *wanted, *key_or_hidden_blocks, *value_blocks;
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

// The layers for some tokens, whose residual stream it holds.
template <class Number>
class Step {
 public:
  Step(Team& team, const StepShape& shape, const StepRows& rows, Number* pool)
      : team_(team), shape_(shape), pool_(pool) {
    const auto add = [&](bool hidden, bool together) {
      for (int r = 0; r < shape.rows; r++)
        if (rows.is_hidden[r] == hidden && (rows.length[r] >= kChunkTokens) == together) {
          if (together) add_chunk({tokens() - num_single_, rows.length[r], rows.start[r]}, hidden, tables_of(rows, r));
          add_tokens(rows, r);
        }
      return tokens();
    };
    num_hidden_ = add(true, false);
    num_single_ = add(false, false);
    end_of_kv_ = add(false, true);
    add(true, true);
    tiles_ = Tiles(tokens());
    const size_t D = shape.width, n = tokens(), wide = size_t(num_hidden_) * shape.heads * D;
    size_t projected = 0;
    for (const Group& group : groups_) projected = std::max(projected, group.projected.size() * D);
    float* at = memory_.of(n * (8 * D + 2 * shape.ffn + shape.heads) + 2 * wide + 3 * projected);
    const auto next = [&](size_t size) { return std::exchange(at, at + size); };
    const auto next_factor = [&](size_t size) { return reinterpret_cast<Factor<Number>*>(next(size)); };
    stream_ = next(n * D), normed_ = next(n * D), transposed_ = next_factor(n * D);
    q_ = next(n * D), k_ = next(n * D), v_ = next(n * D);
    attended_ = next(n * D), added_ = next(n * D);
    inner_ = next(n * shape.ffn), inner_transposed_ = next_factor(n * shape.ffn);
    wide_ = next(wide), wide_found_ = next(wide), lse_ = next(n * shape.heads);
    prefix_transposed_ = next_factor(projected), prefix_k_ = next(projected), prefix_v_ = next(projected);
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
    Number* pool = pool_of(l);
    const auto add_to_stream = [&](const Number* bias) {
      return [=, this](int first, int last, int begin, int end) {
        for (int t = first; t < last; t++)
          for (int i = begin; i < end; i++) {
            float& own = stream_[size_t(t) * D + i];
            own = rounded<Number>(own + biased(added_[size_t(t) * D + i], bias, i));
          }
      };
    };

    enter(shape_.norm_first, own.attention_scale, own.attention_bias);
    std::vector<Product<Number>> products{{own.q, D, q_, with_bias(q_, own.q_bias, scale), 0, n}};
    add_keys_values(products, own, n);  // one by one, hidden rows need none
    multiply(team_, transposed_, tiles_, D, products);
    write(pool);
    attend_hidden(own, pool);
    attend_kv(pool);
    for (const Group& group : groups_) attend_group(group, own, pool);
    each_tile(8.0 * D, [&](int tile) {
      if constexpr (sizeof(Number) < sizeof(float))
        for (size_t i = size_t(tiles_.first(tile)) * D; i < size_t(tiles_.first(tile + 1)) * D; i++)
          attended_[i] = rounded<Number>(attended_[i]);
      transpose_tile(tile, attended_);
    });
    multiply<Factor<Number>, Number>(team_, transposed_, tiles_, D,
                                     {{own.out, D, added_, add_to_stream(own.out_bias), 0, n}});
    if (!shape_.norm_first) norm_stream(own.attention_scale, own.attention_bias);

    enter(shape_.norm_first, own.final_scale, own.final_bias);
    multiply<Factor<Number>, Number>(team_, transposed_, tiles_, D,
                                     {{own.fc1, F, inner_, [&](int first, int last, int begin, int end) {
      const auto relu = [&](float x, int i) {
        const float inner = biased(x, own.fc1_bias, begin + i);
        return inner < 0 ? 0 : inner;  // NaN stays NaN
      };
      for (int t = first; t < last;) {
        const int rows = tiles_.rows(tiles_.of(t));
        transpose([&](int m) { return inner_ + size_t(t + m) * F + begin; }, rows, end - begin,
                  inner_transposed_ + size_t(t) * F + size_t(begin) * rows, rows, relu);
        t += rows;
      }
    }, 0, n}});
    multiply<Factor<Number>, Number>(team_, inner_transposed_, tiles_, F,
                                     {{own.fc2, D, added_, add_to_stream(own.fc2_bias), 0, n}});
    if (!shape_.norm_first) norm_stream(own.final_scale, own.final_bias);
  }

  // Of layer number l only what is cached.
  void cache(const Layer<Number>& own, int l) {
    enter(shape_.norm_first, own.attention_scale, own.attention_bias);
    std::vector<Product<Number>> products;
    add_keys_values(products, own, end_of_kv_);
    multiply(team_, transposed_, tiles_, shape_.width, products);
    write(pool_of(l));
  }

 private:
  struct Token {
    size_t index;  // in x
    int position;
    const int32_t *keys_or_hidden, *values;  // its row's block tables; values is null for a hidden row
  };

  // A place in a layer's blocks: block and token inside.
  struct Cached {
    int32_t block, inside;
  };

  struct Owner {
    bool hidden;
    const int32_t *keys_or_hidden, *values;  // block tables
    size_t projected;  // of the group's, the first of a hidden chunk's prefix
  };

  // Chunks that are attended to together.
  struct Group {
    std::vector<Chunk> chunks;  // begin counts from the first token of any chunk
    std::vector<Owner> owners;
    std::vector<Cached> projected;  // hidden vectors of prefixes
    int keys = 0;
  };

  int tokens() const { return tokens_.size(); }

  // Its block tables, of keys or hidden vectors and of values; null for the values of a hidden row.
  std::pair<const int32_t*, const int32_t*> tables_of(const StepRows& rows, int r) const {
    const size_t at = size_t(r) * shape_.pages;
    return {rows.key_or_hidden_blocks + at, rows.is_hidden[r] ? nullptr : rows.value_blocks + at};
  }

  void add_tokens(const StepRows& rows, int r) {
    const auto [keys_or_hidden, values] = tables_of(rows, r);
    for (int t = 0; t < rows.length[r]; t++) {
      tokens_.push_back({size_t(rows.last[r] - rows.length[r] + 1 + t), rows.start[r] + t, keys_or_hidden, values});
      context_.push_back(rows.start[r] + t + 1);
    }
  }

  void add_chunk(const Chunk& chunk, bool hidden, std::pair<const int32_t*, const int32_t*> tables) {
    if (groups_.empty() || groups_.back().keys + chunk.keys() > kKeysPacked) groups_.emplace_back();
    Group& group = groups_.back();
    group.chunks.push_back(chunk);
    group.owners.push_back({hidden, tables.first, tables.second, group.projected.size()});
    group.keys += chunk.keys();
    for (int t = 0; hidden && t < chunk.prefix; t++)
      group.projected.push_back({tables.first[t / shape_.page_tokens], t % shape_.page_tokens});
  }

  Number* pool_of(int l) const { return pool_ + size_t(l) * shape_.blocks * shape_.page_tokens * shape_.width; }

  // Keys and values of the tokens `[num_hidden_, end)`.
  void add_keys_values(std::vector<Product<Number>>& products, const Layer<Number>& own, int end) const {
    if (num_hidden_ == end) return;
    products.push_back({own.k, shape_.width, k_, with_bias(k_, own.k_bias), num_hidden_, end});
    products.push_back({own.v, shape_.width, v_, with_bias(v_, own.v_bias), num_hidden_, end});
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
  void enter(bool norm, const Number* scale, const Number* bias) {
    const int D = shape_.width;
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

  void transpose_tile(int tile, const float* x) {
    const int D = shape_.width, rows = tiles_.rows(tile);
    const size_t at = size_t(tiles_.first(tile)) * D;
    transpose([&](int m) { return x + at + size_t(m) * D; }, rows, D, transposed_ + at, rows);
  }

  void norm_stream(const Number* scale, const Number* bias) {
    const int D = shape_.width;
    each_token(8.0 * D,
               [&](int t) { normalize(stream_ + size_t(t) * D, scale, bias, D, stream_ + size_t(t) * D); });
  }

  // This step's vectors into their blocks.
  void write(Number* pool) {
    const int D = shape_.width, S = shape_.page_tokens;
    each_token(8.0 * D, [&](int t) {
      const Token& own = tokens_[t];
      const auto put = [&](const float* from, const int32_t* blocks) {
        Number* to = pool + (size_t(blocks[own.position / S]) * S + own.position % S) * D;
        for (int i = 0; i < D; i++) from_float(from[size_t(t) * D + i], to + i);
      };
      put(own.values ? k_ : normed_, own.keys_or_hidden);
      if (own.values) put(v_, own.values);
    });
  }

  Shape attention_shape(int rows) const { return {rows, shape_.heads, shape_.width, shape_.page_tokens}; }

  void attend_kv(const Number* pool) {
    const int first = num_hidden_, count = num_single_ - num_hidden_;
    const size_t at = size_t(first) * shape_.width;
    if (!count) return;
    kv_decode(team_, attention_shape(count), q_ + at, pool,
              [&](int r) { return tokens_[first + r].keys_or_hidden; },
              [&](int r) { return tokens_[first + r].values; }, context_.data() + first, attended_ + at, lse_);
  }

  // Source: docs/hybrid_cache.md: queries of D numbers for each head, over the vectors themselves.
  void attend_hidden(const Layer<Number>& own, const Number* pool) {
    const int count = num_hidden_, D = shape_.width, N = shape_.heads, H = shape_.head_dim();
    if (!count) return;
    constexpr int kPart = 256;
    const int parts = (D + kPart - 1) / kPart;
    team_.run(N * parts, 2.0 * count * N * D * H, [&](int i) {
      const int n = i / parts, begin = i % parts * kPart, end = std::min(begin + kPart, D);
      if (count >= kRowsTogether) return absorb_together(own.k, n, begin, end);
      for (int r = 0; r < count; r++)
        absorb(q_ + size_t(r) * D + size_t(n) * H, own.k + size_t(n) * H * D, begin, end,
               wide_ + (size_t(r) * N + n) * D);
    });
    hidden_decode(team_, attention_shape(count), wide_, pool,
                  [&](int r) { return tokens_[r].keys_or_hidden; }, context_.data(), wide_found_, lse_);
    const Tiles tiles(count);
    team_.run(N, double(count) * D * D, [&](int n) {
      thread_local Scratch scratch;
      float* transposed = scratch.of(size_t(count) * D);
      for (int tile = 0; tile < tiles.count; tile++) {
        const int first = tiles.first(tile), rows = tiles.rows(tile);
        transpose([&](int m) { return wide_found_ + (size_t(first + m) * N + n) * D; }, rows, D,
                  transposed + size_t(first) * D, rows);
      }
      multiply_packed(transposed, tiles, 0, tiles.count, own.v + size_t(n) * H * D, 0, H / kPackedWidth, D,
                      attended_ + n * H, D);
      if (own.v_bias)
        for (int r = 0; r < count; r++)
          for (int i = n * H; i < (n + 1) * H; i++) attended_[size_t(r) * D + i] += to_float(own.v_bias[i]);
    });
  }

  // The numbers of one input in a packed tile, of the outputs from `lane` on.
  static Vector of_inputs(const float* packed_tile, int i, int lane) {
    return load(packed_tile + size_t(i) * kPackedWidth + lane);
  }
  static Vector of_inputs(const BFloat16* packed_tile, int i, int lane) {
    const Bits pairs = load_pairs(packed_tile + (size_t(i / 2) * kPackedWidth + lane) * 2);
    return i % 2 ? seconds(pairs) : firsts(pairs);
  }

  // out [begin, end) = the head's packed tiles times its query, for inputs `[begin, end)`.
  void absorb(const float* q, const Number* packed, int begin, int end, float* out) const {
    const int H = shape_.head_dim(), D = shape_.width;
    for (int at = begin; at < end; at += 4) {
      Vector sums[4] = {};
      const int count = std::min(4, end - at);
      for (int j = 0; j < H; j += kPackedWidth)
        for (int i = 0; i < count; i++)
          for (int lane = 0; lane < kPackedWidth; lane += kLanes)
            sums[i] += load(q + j + lane) * of_inputs(packed + size_t(j) * D, at + i, lane);
      float found[4];
      sum_four(sums[0], sums[1], sums[2], sums[3], found);
      for (int i = 0; i < count; i++) out[at + i] = rounded<Number>(found[i]);
    }
  }

  // The same for all hidden rows that are taken one by one: rows are the lanes of vectors, which pays for many. The
  // sums are in another order.
  void absorb_together(const Number* packed, int n, int begin, int end) const {
    constexpr int kInputs = 8;
    const int D = shape_.width, N = shape_.heads, H = shape_.head_dim();
    thread_local Scratch scratch;
    float* queries = scratch.of(size_t(H) * kPackedWidth);
    for (int first = 0; first < num_hidden_; first += kPackedWidth) {
      const int rows = std::min(kPackedWidth, num_hidden_ - first);
      transpose([&](int r) { return q_ + size_t(first + r) * D + size_t(n) * H; }, rows, H, queries, kPackedWidth);
      for (int at = begin; at < end; at += kInputs) {
        alignas(64) float found[kInputs * kPackedWidth];
        alignas(64) float room[kInputs * kPackedWidth];
        for (int from = 0; from < H; from += kPackedWidth) {
          const Number* packed_tile = packed + (size_t(n) * H + from) * D;
          const float* inputs = as_floats(packed_tile + size_t(at) * kPackedWidth, kInputs, room);
          for (int lane = 0; lane < rows; lane += kLanes) {
            Vector sums[kInputs] = {};
#pragma GCC unroll 8
            for (int i = 0; i < kInputs && from; i++) sums[i] = load(found + i * kPackedWidth + lane);
            for (int j = 0; j < kPackedWidth; j++) {
              const Vector own = load(queries + size_t(from + j) * kPackedWidth + lane);
#pragma GCC unroll 8
              for (int i = 0; i < kInputs; i++) sums[i] += inputs[i * kPackedWidth + j] * own;
            }
#pragma GCC unroll 8
            for (int i = 0; i < kInputs; i++) store(found + i * kPackedWidth + lane, sums[i]);
          }
        }
        for (int r = 0; r < rows; r++)
          for (int i = 0; i < kInputs; i++)
            wide_[(size_t(first + r) * N + n) * D + at + i] = rounded<Number>(found[i * kPackedWidth + r]);
      }
    }
  }

  void attend_group(const Group& group, const Layer<Number>& own, const Number* pool) {
    const int D = shape_.width, S = shape_.page_tokens, H = shape_.head_dim();
    const auto cached = [&](int32_t block, int inside) { return pool + (size_t(block) * S + inside) * D; };
    if (const int rows = group.projected.size()) {
      const Tiles tiles(rows);
      team_.run(tiles.count, 8.0 * rows * D, [&](int i) {
        const int first = tiles.first(i);
        const auto row = [&](int m) {
          const Cached& at = group.projected[first + m];
          return cached(at.block, at.inside);
        };
        transpose(row, tiles.rows(i), D, prefix_transposed_ + size_t(first) * D, tiles.rows(i));
      });
      multiply<Factor<Number>, Number>(team_, prefix_transposed_, tiles, D,
                       {{own.k, D, prefix_k_, with_bias(prefix_k_, own.k_bias), 0, rows},
                        {own.v, D, prefix_v_, with_bias(prefix_v_, own.v_bias), 0, rows}});
    }
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
                      return [=](int t) { return cached(blocks[t / S], t % S) + n * H; };
                    };
                    const auto projected = [&](const float* prefix, const float* now) {
                      prefix += owner.projected * D + n * H;
                      now += at + size_t(chunk.begin) * D + n * H;
                      return [=, cached_tokens = chunk.prefix](int t) {
                        return t < cached_tokens ? prefix + size_t(t) * D : now + size_t(t - cached_tokens) * D;
                      };
                    };
                    if (owner.hidden)
                      pack(projected(prefix_k_, k_), projected(prefix_v_, v_));
                    else
                      pack(paged(owner.keys_or_hidden), paged(owner.values));
                  });
  }

  Team& team_;
  const StepShape shape_;
  Number* pool_;
  // First those of hidden rows that are taken one by one, then of such KV rows, of KV rows' chunks, of hidden rows' chunks.
  std::vector<Token> tokens_;
  std::vector<int32_t> context_;  // by token: cached tokens, itself included
  std::vector<Group> groups_;
  int num_hidden_ = 0, num_single_ = 0, end_of_kv_ = 0;  // tokens of the first, the first two, the first three of these
  Tiles tiles_{0};
  Borrowed memory_;
  float *stream_, *normed_, *q_, *k_, *v_, *attended_, *added_, *inner_;
  float *wide_, *wide_found_, *lse_;  // wide: [hidden tokens one by one, heads, D]
  float *prefix_k_, *prefix_v_;
  Factor<Number> *transposed_, *inner_transposed_, *prefix_transposed_;
};

// x [tokens with padding, width], all layers one after the other. Of the last one, tokens that are not among the wanted
// last ones of their rows get nothing but their place in the cache; theirs in x is what came before it.
template <class Number>
void all_layers(Team& team, const StepShape& shape, const StepRows& rows, const std::vector<Layer<Number>>& layers,
                Number* pool, Number* x) {
  std::vector<int32_t> start(shape.rows), length(shape.rows);
  bool all = true;
  for (int r = 0; r < shape.rows; r++) {
    length[r] = std::min(rows.wanted[r], rows.length[r]);
    start[r] = rows.start[r] + rows.length[r] - length[r];
    all &= length[r] == rows.length[r];
  }
  Step<Number> step(team, shape, rows, pool);
  const int count = layers.size(), whole = all ? count : count - 1;
  step.start(x);
  for (int l = 0; l < whole; l++) step.run(layers[l], l);
  if (!all) step.cache(layers[whole], whole);
  step.finish(x);
  if (all) return;
  StepRows wanted = rows;
  wanted.start = start.data(), wanted.length = length.data();
  Step<Number> last(team, shape, wanted, pool);
  last.start(x);
  last.run(layers[whole], whole);
  last.finish(x);
}

// In layers_float.cc and layers_bfloat16.cc, which are compiled at the same time.
extern template void all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<float>>&, float*,
                                float*);
extern template void all_layers(Team&, const StepShape&, const StepRows&, const std::vector<Layer<BFloat16>>&,
                                BFloat16*, BFloat16*);

}  // namespace apt
