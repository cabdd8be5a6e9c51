// One query per request over its cached tokens, read where they lie: pages of the pool `[pages, page_tokens, D]`. While
// some are multiplied, memory is asked for the next ones.
//
// Pages of codes (int8.h) have scales `[heads, page_tokens]` beside them; a hidden vector has the same for all heads.
// Scales go into scores and weights. Hidden vectors of codes are relative to their channels (apt_jax/attention/int8.py),
// which is the caller's to heed, in queries and results.
//
// KV rows go head by head over keys and values; hidden rows take wide queries, of D numbers for each head, over the
// hidden vectors themselves. Both keep a running softmax over kTokens tokens at a time. A number beyond a row's length
// is never used, whatever it holds.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kTokens = 64;
constexpr int kParts = 8;  // of a long row, that threads share
// Heads of which the sums stay in registers: with four tokens, and of some vectors of values.
#if defined(__AVX512F__)
constexpr int kHeads = 4, kValueHeads = 8, kValueVectors = 3;
#elif defined(__AVX__)
constexpr int kHeads = 2, kValueHeads = 2, kValueVectors = 4;
#else
constexpr int kHeads = 4, kValueHeads = 4, kValueVectors = 4;
#endif

// Of hidden rows, whose queries are multiplied as X.
template <class X>
constexpr int kScoreHeads = kMultipliesPairs && std::is_same_v<X, BFloat16> ? 6 : kHeads;

struct Shape {
  int rows, heads, width, page_tokens;  // width: D
};

// The pool of a layer; scales only of codes, `scale_row` apart from page to page.
template <class Number>
struct Pages {
  const Number* numbers;
  const float* scales = nullptr;
  int scale_row = 0;

  const Number* at(const Shape& shape, int page, int inside) const {
    return numbers + (size_t(page) * shape.page_tokens + inside) * shape.width;
  }
  const float* scales_at(const Shape& shape, int page, int inside) const {
    return scales ? scales + size_t(page) * scale_row + inside : nullptr;
  }
};

// The running softmax of one row, or part of one: greatest score and sum of weights by head, and the weighted sum
// `[heads, size]` of values.
struct Running {
  float* top;
  float* total;
  float* out;
  int heads, size;

  void clear() {
    std::fill(top, top + heads, kNever);
    std::fill(total, total + heads, 0.0f);
    std::fill(out, out + size_t(heads) * size, 0.0f);
  }

  // Turns `scores [heads, kTokens]` into weights, and scales what was summed before to the new greatest score.
  void weigh(float* scores, int tokens) {
    for (int n = 0; n < heads; n++) {
      float* own = scores + n * kTokens;
      float greatest = top[n];
      for (int t = 0; t < tokens; t++) greatest = std::max(greatest, own[t]);
      const float keep = std::exp(top[n] - greatest);
      top[n] = greatest;
      for (int t = tokens; t < kTokens; t++) own[t] = -std::numeric_limits<float>::infinity();
      Vector sums{};
      for (int t = 0; t < kTokens; t += kLanes) {
        const Vector weights = exp(load(own + t) - greatest);
        store(own + t, weights);
        sums += weights;
      }
      total[n] = total[n] * keep + sum(sums);
      if (keep != 1.0f)
        for (int i = 0; i < size; i++) out[size_t(n) * size + i] *= keep;
    }
  }
};

// out [M, size] += weights [M, kTokens] times tokens' numbers from `from` on, as many as kVectors vectors have.
template <int M, int kVectors, class Number>
inline void add_values(const float* weights, const Number* const* tokens, size_t from, int count, float* out,
                       size_t out_step) {
  Vector sums[M][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) sums[m][i] = load(out + m * out_step + i * kLanes);
  for (int t = 0; t < count; t++) {
    Vector own[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) own[i] = load_as_float(tokens[t] + from + i * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const float weight = weights[m * kTokens + t];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) sums[m][i] += weight * own[i];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) store(out + m * out_step + i * kLanes, sums[m][i]);
}

// The same of `size` numbers.
template <int M, int kVectors, class Number>
inline void add_all_values(const float* weights, const Number* const* tokens, size_t from, int count, int size,
                           float* out, size_t out_step) {
  int at = 0;
  for (; at + kVectors * kLanes <= size; at += kVectors * kLanes)
    add_values<M, kVectors>(weights, tokens, from + at, count, out + at, out_step);
  for (; at + kLanes <= size; at += kLanes)
    add_values<M, 1>(weights, tokens, from + at, count, out + at, out_step);
  for (; at < size; at++)
    for (int m = 0; m < M; m++)
      for (int t = 0; t < count; t++)
        out[m * out_step + at] += weights[m * kTokens + t] * to_float(tokens[t][from + at]);
}

#if defined(__AVX512BF16__)
// out [M, two vectors] += weights [M, kTokens] times tokens' numbers from `from` on, two tokens at a time: where
// their number is odd, the last one comes twice, the second time with the weight 0.
template <int M>
inline void add_value_pairs(const BFloat16* weights, const BFloat16* const* tokens, size_t from, int pairs, float* out,
                            size_t out_step) {
  Vector sums[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) sums[m][i] = load(out + m * out_step + i * kLanes);
  for (int p = 0; p < pairs; p++) {
    const auto [low, high] = interleave(load_pairs(tokens[2 * p] + from), load_pairs(tokens[2 * p + 1] + from));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Bits own = same(weights + m * kTokens + 2 * p);
      sums[m][0] = add_products(sums[m][0], own, low);
      sums[m][1] = add_products(sums[m][1], own, high);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) store(out + m * out_step + i * kLanes, sums[m][i]);
}
#endif

// q as it is multiplied with tokens.
inline const float* as_factors(const float* q, int, std::vector<float>&) { return q; }
inline const BFloat16* as_factors(const BFloat16* q, int, std::vector<BFloat16>&) { return q; }
inline const BFloat16* as_factors(const float* q, int size, std::vector<BFloat16>& room) {
  room.resize(size);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store_as(&room[i], load(q + i));
  for (; i < size; i++) from_float(q[i], &room[i]);
  return room.data();
}

// scores [M, kTokens] of queries [M, size] and four tokens' numbers from `from` on.
template <int M, class X, class Number>
__attribute__((noinline)) void four_scores(const X* q, const Number* const* tokens, size_t from, int size,
                                           float* scores) {
  Vector sums[M][4] = {};
  int at = 0;
  if constexpr (std::is_same_v<X, BFloat16>)
    for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
      Bits own[4];
#pragma GCC unroll 8
      for (int i = 0; i < 4; i++) own[i] = load_pairs(tokens[i] + from + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Bits query = load_pairs(q + size_t(m) * size + at);
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++) sums[m][i] = add_products(sums[m][i], query, own[i]);
      }
    }
  for (; at + kLanes <= size; at += kLanes)
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
      const Vector own = load_as_float(tokens[i] + from + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][i] += load_as_float(q + size_t(m) * size + at) * own;
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    float* to = scores + m * kTokens;
    sum_four(sums[m][0], sums[m][1], sums[m][2], sums[m][3], to);
    for (int i = 0; i < 4; i++)
      for (int rest = at; rest < size; rest++)
        to[i] += to_float(q[size_t(m) * size + rest]) * to_float(tokens[i][from + rest]);
  }
}

// The same of up to four.
template <int M, class X, class Number>
inline void few_scores(const X* q, const Number* const* tokens, size_t from, int count, int size, float* scores) {
  if (count >= 4) return four_scores<M>(q, tokens, from, size, scores);
  const Number* four[4];
  for (int i = 0; i < 4; i++) four[i] = tokens[std::min(i, count - 1)];
  float found[M * kTokens];
  four_scores<M>(q, four, from, size, found);
  for (int m = 0; m < M; m++) std::copy_n(found + m * kTokens, count, scores + m * kTokens);
}

// Tokens `[begin, end)` of a row as they lie in its `blocks`, page by page: `visit(numbers, scales, first token - begin,
// tokens)`.
template <class Number, class Visit>
void each_page(const Shape& shape, const Pages<Number>& pool, const int32_t* blocks, int begin, int end,
               const Visit& visit) {
  for (int t = begin; t < end;) {
    const int inside = t % shape.page_tokens, count = std::min(shape.page_tokens - inside, end - t);
    const int page = blocks[t / shape.page_tokens];
    visit(pool.at(shape, page, inside), pool.scales_at(shape, page, inside), t - begin, count);
    t += count;
  }
}

inline void bring(const char* from, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

// Tokens `[begin, end)` of a row.
struct Part {
  int row, begin, end;

  int tokens() const { return end - begin; }
};

// Tokens that are to be fetched in the steps that are left, whole ones, as evenly as can be.
template <class Number>
struct Ahead {
  const Number* const* tokens;
  int at, end, steps, bytes;

  void step() {
    if (steps <= 0) return;
    for (const int to = at + (end - at + steps - 1) / steps; at < to; at++)
      bring(reinterpret_cast<const char*>(tokens[at]), bytes);
    steps--;
  }
};

// A part of a KV row: q `[heads, head_dim]`; of `next` the first page is fetched.
template <class Number, class KeyBlocks, class ValueBlocks>
void kv_part(const Shape& shape, const float* q, const Pages<Number>& pool, const KeyBlocks& key_blocks,
             const ValueBlocks& value_blocks, const Part& part, const Part& next, Running& running) {
  using X = std::conditional_t<std::is_same_v<Number, int8_t>, float, Factor<Number>>;
  constexpr bool kCodes = std::is_same_v<Number, int8_t>;
  struct Page {
    const Number* numbers;
    const float* scales;
    int at, count;  // of the kTokens at a time
    bool keys;
  };
  const int D = shape.width, H = D / shape.heads;
  thread_local std::vector<float> scores;
  thread_local std::vector<Page> pages;
  thread_local std::vector<X> room;
  const auto* queries = as_factors(q, D, room);
  scores.resize(size_t(shape.heads) * kTokens);
  pages.clear();
  const auto add = [&](const Part& own, bool keys) {
    each_page(shape, pool, keys ? key_blocks(own.row) : value_blocks(own.row), own.begin, own.end,
              [&](const Number* numbers, const float* scales, int at, int count) {
                pages.push_back({numbers, scales, at, count, keys});
              });
  };
  for (int first = part.begin; first < part.end; first += kTokens)
    for (const bool keys : {true, false}) add({part.row, first, std::min(first + kTokens, part.end)}, keys);
  const size_t count = pages.size();
  add({next.row, next.begin, std::min(next.begin + 1, next.end)}, true);
  for (size_t i = 0; i < count; i++) {
    const Page& own = pages[i];
    const Number* tokens[kTokens];
    for (int t = 0; t < own.count; t++) tokens[t] = own.numbers + size_t(t) * D;
    const char* fetched = reinterpret_cast<const char*>(pages[std::min(i + 1, pages.size() - 1)].numbers);
    const int pieces = own.keys ? (own.count + 3) / 4 * shape.heads : shape.heads;
    const int share = own.count * D * int(sizeof(Number)) / pieces;
    if (own.keys) {
      for (int t = 0; t < own.count; t += 4)
        for (int n = 0; n < shape.heads; n++, fetched += share) {
          bring(fetched, share);
          float* to = scores.data() + size_t(n) * kTokens + own.at + t;
          const int count = std::min(own.count - t, 4);
          few_scores<1>(queries + n * H, tokens + t, n * H, count, H, to);
          if constexpr (kCodes)
            for (int i = 0; i < count; i++) to[i] *= own.scales[n * shape.page_tokens + t + i];
        }
      if (!pages[i + 1].keys) running.weigh(scores.data(), own.at + own.count);
      continue;
    }
    for (int n = 0; n < shape.heads; n++, fetched += share) {
      bring(fetched, share);
      const float* weights = scores.data() + size_t(n) * kTokens + own.at;
      float scaled[kTokens];
      if constexpr (kCodes) {
        for (int t = 0; t < own.count; t++) scaled[t] = weights[t] * own.scales[n * shape.page_tokens + t];
        weights = scaled;
      }
      add_all_values<1, 4>(weights, tokens, n * H, own.count, H, running.out + n * H, H);
    }
  }
}

// All heads in groups of one size after the other, as many as fit: `work(first head, size)`.
template <int... sizes, class Work>
inline void in_groups(int heads, const Work& work) {
  int n = 0;
  const auto of_size = [&](auto size) {
    for (; n + size <= heads; n += size) work(n, size);
  };
  (of_size(std::integral_constant<int, sizes>()), ...);
}

// A token's codes as they are multiplied, in `room`.
template <class X>
inline const X* as_multiplied(const int8_t* token, int size, X* room) {
  int at = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<X, BFloat16>)
    for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
      const auto pairs = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load_as_float(token + at + kLanes)),
                                             reinterpret_cast<__m512>(load_as_float(token + at)));
      std::memcpy(room + at, &pairs, sizeof pairs);
    }
#endif
  if constexpr (std::is_same_v<X, float>)
    for (; at + kLanes <= size; at += kLanes) store(room + at, load_as_float(token + at));
  for (; at < size; at++) from_float(to_float(token[at]), room + at);
  return room;
}

// A part of a hidden row: q `[heads, D]`, multiplied as X; so are weights. `blocks(row)` is a row's table; of `next`, the
// part that this thread is likely to take next, the first tokens are fetched.
template <class X, class Query, class Number, class Blocks>
void hidden_part(const Shape& shape, const Query* q, const Pages<Number>& pool, const Blocks& blocks, const Part& part,
                 const Part& next, Running& running) {
  constexpr bool kCodes = std::is_same_v<Number, int8_t>, kPairs = std::is_same_v<X, BFloat16>;
  constexpr int kPart = (kPairs ? 2 : kValueVectors) * kLanes;
  // Codes are widened for kTokens at once, or to float32 for four and then again by slices, which caches hold better.
  constexpr bool kTwice = kCodes && !kPairs;
  const int D = shape.width, N = shape.heads;
  thread_local std::vector<float> scores, scales;
  thread_local std::vector<const Number*> all;
  thread_local std::vector<X> room, widened, weights;
  const auto* queries = as_factors(q, N * D, room);
  scores.resize(size_t(N) * kTokens);
  if (kPairs) weights.resize(size_t(N) * kTokens);
  if (kCodes) widened.resize(size_t(kTwice ? 4 : kTokens) * D);
  all.clear(), scales.clear();
  for (const Part& own : {part, Part{next.row, next.begin, std::min(next.end, next.begin + kTokens)}})
    each_page(shape, pool, blocks(own.row), own.begin, own.end, [&](const Number* page, const float* of_page, int, int count) {
      for (int t = 0; t < count; t++) {
        all.push_back(page + size_t(t) * D);
        if (kCodes) scales.push_back(of_page[t]);
      }
    });
  if (kCodes) scales.resize(all.size() + kTokens);  // whole vectors of them
  alignas(64) X slices[kTwice ? kTokens * kPart : 1];
  const auto scale = [&](int first) {
    for (int n = 0; kCodes && n < N; n++)
      for (int t = 0; t < kTokens; t += kLanes) {
        float* own = scores.data() + size_t(n) * kTokens + t;
        store(own, load(own) * load(scales.data() + first + t));
      }
  };
  for (int first = 0; first < part.tokens(); first += kTokens) {
    const int count = std::min(kTokens, part.tokens() - first);
    Ahead<Number> ahead{all.data(), first + count, std::min(first + count + kTokens, int(all.size())),
                        (count + 3) / 4 + (D + kPart - 1) / kPart, D * int(sizeof(Number))};
    std::conditional_t<kCodes, const X*, const Number*> tokens[kTokens];
    for (int t = 0; t < count; t++) {
      if constexpr (kTwice)
        tokens[t] = widened.data() + size_t(t % 4) * D;
      else if constexpr (kCodes)
        tokens[t] = as_multiplied(all[first + t], D, widened.data() + size_t(t) * D);
      else
        tokens[t] = all[first + t];
    }
    if (count % 2) tokens[count] = tokens[count - 1];
    for (int t = 0; t < count; t += 4) {
      float* to = scores.data() + t;
      ahead.step();
      if constexpr (kTwice)
        for (int i = t; i < std::min(t + 4, count); i++) as_multiplied(all[first + i], D, widened.data() + size_t(i % 4) * D);
      in_groups<kScoreHeads<X>, 4, 1>(N, [&]<int M>(int n, std::integral_constant<int, M>) {
        few_scores<M>(queries + size_t(n) * D, tokens + t, 0, count - t, D, to + size_t(n) * kTokens);
      });
    }
    scale(first);
    running.weigh(scores.data(), count);
    scale(first);
    if constexpr (kPairs)
      for (size_t i = 0; i < weights.size(); i += kLanes) store_as(&weights[i], load(&scores[i]));
    for (int at = 0; at < D; at += kPart) {
      ahead.step();
      const int size = std::min(kPart, D - at), from = kTwice ? 0 : at;
      if constexpr (kTwice)
        for (int t = 0; t < count; t++) tokens[t] = as_multiplied(all[first + t] + at, size, slices + t * kPart);
#if defined(__AVX512BF16__)
      if constexpr (kPairs)
        if (size == kPart) {
          in_groups<12, 8, 4, 1>(N, [&]<int M>(int n, std::integral_constant<int, M>) {
            add_value_pairs<M>(weights.data() + size_t(n) * kTokens, tokens, at, (count + 1) / 2,
                               running.out + size_t(n) * D + at, D);
          });
          continue;
        }
#endif
      in_groups<kValueHeads, 4, 1>(N, [&]<int M>(int n, std::integral_constant<int, M>) {
        add_all_values<M, kPart / kLanes>(scores.data() + size_t(n) * kTokens, tokens, from, count, size,
                                         running.out + size_t(n) * D + at, D);
      });
    }
  }
}

// Rows of `length` tokens in parts that threads share, and their parts merged: `attend(part, next, running)`, `next` the part that the thread is likely to take next. Where
// parts end depends on the length alone, so a row's results do not depend on other rows or on the number of threads.
// out `[rows, heads, size]` and lse `[rows, heads]`; zeros and kNever for a row of length 0.
inline void attend_rows(Team& team, const Shape& shape, int size, const int32_t* length, float* out, float* lse,
                        const std::function<void(const Part&, const Part&, Running&)>& attend) {
  const int heads = shape.heads;
  const size_t numbers = size_t(heads) * size;
  struct Numbered : Part {
    size_t number, apart;  // of all; of those in rows with several, from 1 on
  };
  std::vector<Numbered> parts;
  std::vector<int> first(shape.rows + 1);
  size_t apart = 0;  // parts of rows that have several
  for (int r = 0; r < shape.rows; r++) {
    first[r] = parts.size();
    const int tokens = std::max((length[r] + kParts - 1) / kParts, 2 * kTokens);
    for (int begin = 0; begin < std::max(length[r], 1); begin += tokens)
      parts.push_back({{r, begin, std::min(begin + tokens, length[r])}, parts.size(), length[r] > tokens ? ++apart : 0});
  }
  first[shape.rows] = parts.size();
  std::vector<float> tops(parts.size() * heads), totals(parts.size() * heads);
  thread_local Scratch scratch;
  float* sums = scratch.of(apart * numbers);
  const auto running_of = [&](const Numbered& part) {
    float* own = part.apart ? sums + (part.apart - 1) * numbers : out + part.row * numbers;
    return Running{tops.data() + part.number * heads, totals.data() + part.number * heads, own, heads, size};
  };
  std::vector<Numbered> order = parts;
  std::stable_sort(order.begin(), order.end(), [](const Part& a, const Part& b) { return a.tokens() > b.tokens(); });
  double tokens = 0;
  for (int r = 0; r < shape.rows; r++) tokens += length[r];
  team.run(order.size(), 2 * tokens * numbers, [&](int i) {
    Running running = running_of(order[i]);
    running.clear();
    const size_t next = i + team.threads();
    if (order[i].tokens() > 0) attend(order[i], next < order.size() ? order[next] : Part{order[i].row, 0, 0}, running);
  });
  team.run(shape.rows, double(parts.size()) * numbers, [&](int r) {
    for (int n = 0; n < heads; n++) {
      float top = kNever, total = 0;
      for (int p = first[r]; p < first[r + 1]; p++) top = std::max(top, tops[size_t(p) * heads + n]);
      for (int p = first[r]; p < first[r + 1]; p++)
        total += totals[size_t(p) * heads + n] * std::exp(tops[size_t(p) * heads + n] - top);
      float* to = out + r * numbers + size_t(n) * size;
      const bool empty = !(total != 0);  // NaN counts as something
      for (int p = first[r]; p < first[r + 1]; p++) {
        const Running part = running_of(parts[p]);
        const float scale = empty ? 0 : std::exp(part.top[n] - top) / total;
        for (int i = 0; i < size; i++) {
          const float own = part.out[size_t(n) * size + i] * scale;
          to[i] = p == first[r] ? own : to[i] + own;
        }
      }
      lse[size_t(r) * heads + n] = empty ? kNever : top + std::log(total);
    }
  });
}

// The tables of a row r are `key_blocks(r)` and `value_blocks(r)`.
template <class Number, class KeyBlocks, class ValueBlocks>
void kv_decode(Team& team, const Shape& shape, const float* q, const Pages<Number>& pool, const KeyBlocks& key_blocks,
               const ValueBlocks& value_blocks, const int32_t* length, float* out, float* lse) {
  attend_rows(team, shape, shape.width / shape.heads, length, out, lse, [&](const Part& part, const Part& next, Running& running) {
    kv_part(shape, q + size_t(part.row) * shape.width, pool, key_blocks, value_blocks, part, next, running);
  });
}

// Queries, float32 or X, are multiplied as X.
template <class X, class Query, class Number, class Blocks>
void hidden_decode(Team& team, const Shape& shape, const Query* q, const Pages<Number>& pool, const Blocks& blocks,
                   const int32_t* length, float* out, float* lse) {
  const int D = shape.width;
  attend_rows(team, shape, D, length, out, lse, [&](const Part& part, const Part& next, Running& running) {
    hidden_part<X>(shape, q + size_t(part.row) * shape.heads * D, pool, blocks, part, next, running);
  });
}

}  // namespace apt
