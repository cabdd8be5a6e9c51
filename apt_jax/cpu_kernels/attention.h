// One query per request over its cached tokens, read where they lie: pages of the pool `[pages, page_tokens, D]`. While
// some are multiplied, memory is asked for the next ones.
//
// Pages of codes (int8.h) have scales `[heads, page_tokens]` beside them; a hidden vector has the same for all heads.
// Scales go into scores and weights. Hidden vectors of codes are relative to their channels (apt_jax/attention/int8.py),
// which is the caller's to heed, in queries and results.
//
// KV rows go head by head over keys and values; hidden rows take wide queries, of D numbers for each head, over the
// hidden vectors themselves. Both keep a running softmax over kTokens tokens at a time. A number beyond a row's length
// is never used, whatever it holds. Neighbouring tokens of one request share each read of what is cached before them.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "memory.h"
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

// The running softmax of a query, or of part of its row: greatest score and sum of weights by head, and the weighted sum
// `[heads, size]` of values. Of several queries one follows the other.
struct Running {
  float* top;
  float* total;
  float* out;
  int heads, size;

  Running query(int number) const {
    return {top + number * heads, total + number * heads, out + size_t(number) * heads * size, heads, size};
  }

  void clear(int queries) {
    std::fill_n(top, queries * heads, kNever);
    std::fill_n(total, queries * heads, 0.0f);
    std::fill_n(out, size_t(queries) * heads * size, 0.0f);
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

// out [M, size] += weights [M, ..] times tokens' numbers from `from` on, as many as kVectors vectors have.
template <int M, int kVectors, class Number>
inline void add_values(const float* weights, size_t weight_step, const Number* const* tokens, size_t from, int count,
                       float* out, size_t out_step) {
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
      const float weight = weights[m * weight_step + t];
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
inline void add_all_values(const float* weights, size_t weight_step, const Number* const* tokens, size_t from, int count,
                           int size, float* out, size_t out_step) {
  int at = 0;
  for (; at + kVectors * kLanes <= size; at += kVectors * kLanes)
    add_values<M, kVectors>(weights, weight_step, tokens, from + at, count, out + at, out_step);
  for (; at + kLanes <= size; at += kLanes)
    add_values<M, 1>(weights, weight_step, tokens, from + at, count, out + at, out_step);
  for (; at < size; at++)
    for (int m = 0; m < M; m++)
      for (int t = 0; t < count; t++)
        out[m * out_step + at] += weights[m * weight_step + t] * to_float(tokens[t][from + at]);
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
inline const float* as_factors(const float* q, int, Aligned<float>&) { return q; }
inline const BFloat16* as_factors(const BFloat16* q, int, Aligned<BFloat16>&) { return q; }
inline const BFloat16* as_factors(const float* q, int size, Aligned<BFloat16>& room) {
  room.resize(size);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store_as(&room[i], load(q + i));
  for (; i < size; i++) from_float(q[i], &room[i]);
  return room.data();
}

// scores [M, ..] of queries [M, size] and four tokens' numbers from `from` on.
template <int M, class X, class Number>
__attribute__((noinline)) void four_scores(const X* q, size_t q_step, const Number* const* tokens, size_t from, int size,
                                           float* scores, size_t score_step) {
  Vector sums[M][4] = {};
  int at = 0;
  if constexpr (std::is_same_v<X, BFloat16>)
    for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
      Bits own[4];
#pragma GCC unroll 8
      for (int i = 0; i < 4; i++) own[i] = load_pairs(tokens[i] + from + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Bits query = load_pairs(q + m * q_step + at);
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++) sums[m][i] = add_products(sums[m][i], query, own[i]);
      }
    }
  for (; at + kLanes <= size; at += kLanes)
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
      const Vector own = load_as_float(tokens[i] + from + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][i] += load_as_float(q + m * q_step + at) * own;
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    float* to = scores + m * score_step;
    sum_four(sums[m][0], sums[m][1], sums[m][2], sums[m][3], to);
    for (int i = 0; i < 4; i++)
      for (int rest = at; rest < size; rest++)
        to[i] += to_float(q[m * q_step + rest]) * to_float(tokens[i][from + rest]);
  }
}

// The same of up to four.
template <int M, class X, class Number>
inline void few_scores(const X* q, size_t q_step, const Number* const* tokens, size_t from, int count, int size,
                       float* scores, size_t score_step) {
  if (count >= 4) return four_scores<M>(q, q_step, tokens, from, size, scores, score_step);
  const Number* four[4];
  for (int i = 0; i < 4; i++) four[i] = tokens[std::min(i, count - 1)];
  float found[M * 4];
  four_scores<M>(q, q_step, four, from, size, found, 4);
  for (int m = 0; m < M; m++) std::copy_n(found + m * 4, count, scores + m * score_step);
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

// Neighbouring queries of one request, of which each sees a token more than the one before.
struct Neighbours {
  int first, count;
};

// Tokens `[begin, end)` of the row of some neighbours, the first of which has `length` tokens.
struct Part {
  Neighbours queries;
  int length, begin, end;

  int tokens() const { return end - begin; }
  // Of `count` tokens from `from` on, those that a query sees.
  int seen(int query, int from, int count) const { return std::clamp(length + query - from, 0, count); }
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

// All heads, or queries, in groups of one size after the other, as many as fit: `work(first, size)`.
template <int... sizes, class Work>
inline void in_groups(int count, const Work& work) {
  int n = 0;
  const auto of_size = [&](auto size) {
    for (; n + size <= count; n += size) work(n, size);
  };
  (of_size(std::integral_constant<int, sizes>()), ...);
}

// A part of a KV row: q `[queries, heads, head_dim]`; of `next` the first page is fetched.
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
  const int D = shape.width, N = shape.heads, H = D / N, queries = part.queries.count;
  const size_t of_query = size_t(N) * kTokens;
  thread_local Aligned<float> scores;
  thread_local std::vector<Page> pages;
  thread_local Aligned<X> room;
  const auto* factors = as_factors(q, queries * D, room);
  scores.resize(queries * of_query);
  pages.clear();
  const auto add = [&](const Part& own, int begin, int end, bool keys) {
    const int row = own.queries.first;
    each_page(shape, pool, keys ? key_blocks(row) : value_blocks(row), begin, end,
              [&](const Number* numbers, const float* scales, int at, int count) {
                pages.push_back({numbers, scales, at, count, keys});
              });
  };
  for (int first = part.begin; first < part.end; first += kTokens)
    for (const bool keys : {true, false}) add(part, first, std::min(first + kTokens, part.end), keys);
  const size_t count = pages.size();
  add(next, next.begin, std::min(next.begin + 1, next.end), true);
  int first = part.begin;  // of the kTokens at a time
  for (size_t i = 0; i < count; i++) {
    const Page& own = pages[i];
    const Number* tokens[kTokens];
    for (int t = 0; t < own.count; t++) tokens[t] = own.numbers + size_t(t) * D;
    const char* fetched = reinterpret_cast<const char*>(pages[std::min(i + 1, pages.size() - 1)].numbers);
    const int pieces = own.keys ? (own.count + 3) / 4 * N : N;
    const int share = own.count * D * int(sizeof(Number)) / pieces;
    if (own.keys) {
      for (int t = 0; t < own.count; t += 4)
        for (int n = 0; n < N; n++, fetched += share) {
          bring(fetched, share);
          const int count = std::min(own.count - t, 4);
          in_groups<kHeads, 2, 1>(queries, [&]<int M>(int m, std::integral_constant<int, M>) {
            float* to = scores.data() + m * of_query + size_t(n) * kTokens + own.at + t;
            few_scores<M>(factors + size_t(m) * D + n * H, D, tokens + t, n * H, count, H, to, of_query);
            if constexpr (kCodes)
              for (int query = 0; query < M; query++)
                for (int i = 0; i < count; i++)
                  to[query * of_query + i] *= own.scales[n * shape.page_tokens + t + i];
          });
        }
      if (!pages[i + 1].keys)
        for (int m = 0; m < queries; m++)
          running.query(m).weigh(scores.data() + m * of_query, part.seen(m, first, own.at + own.count));
      continue;
    }
    for (int n = 0; n < N; n++, fetched += share) {
      bring(fetched, share);
      in_groups<kHeads, 2, 1>(queries, [&]<int M>(int m, std::integral_constant<int, M>) {
        const float* weights = scores.data() + m * of_query + size_t(n) * kTokens + own.at;
        size_t weight_step = of_query;
        float scaled[M * kTokens];
        if constexpr (kCodes) {
          for (int query = 0; query < M; query++)
            for (int t = 0; t < own.count; t++)
              scaled[query * kTokens + t] = weights[query * of_query + t] * own.scales[n * shape.page_tokens + t];
          weights = scaled, weight_step = kTokens;
        }
        add_all_values<M, 4>(weights, weight_step, tokens, n * H, own.count, H, running.query(m).out + n * H, D);
      });
    }
    if (own.at + own.count == kTokens) first += kTokens;
  }
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

// A part of a hidden row: q `[queries, heads, D]`, multiplied as X; so are weights. `blocks(row)` is a row's table; of `next`, the
// part that this thread is likely to take next, the first tokens are fetched.
template <class X, class Query, class Number, class Blocks>
void hidden_part(const Shape& shape, const Query* q, const Pages<Number>& pool, const Blocks& blocks, const Part& part,
                 const Part& next, Running& running) {
  constexpr bool kCodes = std::is_same_v<Number, int8_t>, kPairs = std::is_same_v<X, BFloat16>;
  constexpr int kPart = (kPairs ? 2 : kValueVectors) * kLanes;
  // Codes are widened for kTokens at once, or to float32 for four and then again by slices, which caches hold better.
  constexpr bool kTwice = kCodes && !kPairs;
  const int D = shape.width, neighbours = part.queries.count, N = neighbours * shape.heads;
  thread_local Aligned<float> scores, scales;
  thread_local std::vector<const Number*> all;
  thread_local Aligned<X> room, widened, weights;
  const auto* queries = as_factors(q, N * D, room);
  scores.resize(size_t(N) * kTokens);
  if (kPairs) weights.resize(size_t(N) * kTokens);
  if (kCodes) widened.resize(size_t(kTwice ? 4 : kTokens) * D);
  all.clear(), scales.clear();
  const auto add = [&](const Part& own, int end) {
    each_page(shape, pool, blocks(own.queries.first), own.begin, end, [&](const Number* page, const float* of_page, int, int count) {
      for (int t = 0; t < count; t++) {
        all.push_back(page + size_t(t) * D);
        if (kCodes) scales.push_back(of_page[t]);
      }
    });
  };
  add(part, part.end);
  add(next, std::min(next.end, next.begin + kTokens));
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
        few_scores<M>(queries + size_t(n) * D, D, tokens + t, 0, count - t, D, to + size_t(n) * kTokens, kTokens);
      });
    }
    scale(first);
    for (int m = 0; m < neighbours; m++)
      running.query(m).weigh(scores.data() + size_t(m) * shape.heads * kTokens, part.seen(m, part.begin + first, count));
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
        add_all_values<M, kPart / kLanes>(scores.data() + size_t(n) * kTokens, kTokens, tokens, from, count, size,
                                         running.out + size_t(n) * D + at, D);
      });
    }
  }
}

// Tokens of a part of a row: of its length alone.
inline int tokens_of_part(int length) {
  return std::max((length + kParts * kTokens - 1) / (kParts * kTokens), 2) * kTokens;
}

// Rows of `length` tokens in parts that threads share, and their parts merged: `attend(part, next, running)`, `next` the
// part that the thread is likely to take next. Where parts end depends on the length alone, so a row's results do not
// depend on other rows, on its neighbours or on the number of threads. `rows` has every row once.
// out `[rows, heads, size]` and lse `[rows, heads]`; zeros and kNever for a row of length 0.
inline void attend_rows(Team& team, const Shape& shape, int size, const std::vector<Neighbours>& rows,
                        const int32_t* length, float* out, float* lse,
                        const std::function<void(const Part&, const Part&, Running&)>& attend) {
  const int heads = shape.heads;
  const size_t numbers = size_t(heads) * size;
  struct Numbered : Part {
    size_t number, apart;  // queries before, of all parts; of those in rows with several parts, from 1 on
  };
  std::vector<Numbered> parts;
  std::vector<std::pair<int, int>> parts_of(shape.rows);  // by query, `[first, last)` of `parts`
  size_t number = 0, apart = 0;
  const auto add = [&](const Neighbours& own) {
    const int longest = length[own.first] + own.count - 1, tokens = tokens_of_part(longest), first = parts.size();
    for (int begin = 0; begin < std::max(longest, 1); begin += tokens, number += own.count) {
      parts.push_back({{own, length[own.first], begin, std::min(begin + tokens, longest)}, number, 0});
      if (longest > tokens) parts.back().apart = apart + 1, apart += own.count;
    }
    for (int m = 0; m < own.count; m++) parts_of[own.first + m] = {first, int(parts.size())};
  };
  for (const Neighbours& own : rows)
    for (int first = own.first, m = 1; m <= own.count; m++)
      if (m == own.count || tokens_of_part(length[own.first] + m) != tokens_of_part(length[own.first] + m - 1)) {
        add({first, own.first + m - first});
        first = own.first + m;
      }
  std::vector<float> tops(number * heads), totals(number * heads);
  thread_local Scratch scratch;
  float* sums = scratch.of(apart * numbers);
  const auto running_of = [&](const Numbered& part) {
    float* own = part.apart ? sums + (part.apart - 1) * numbers : out + part.queries.first * numbers;
    return Running{tops.data() + part.number * heads, totals.data() + part.number * heads, own, heads, size};
  };
  const auto work_of = [](const Part& part) { return part.tokens() * part.queries.count; };
  std::vector<Numbered> order = parts;
  std::stable_sort(order.begin(), order.end(), [&](const Part& a, const Part& b) { return work_of(a) > work_of(b); });
  double tokens = 0;
  for (const Part& part : parts) tokens += work_of(part);
  team.run(order.size(), 2 * tokens * numbers, [&](int i) {
    Running running = running_of(order[i]);
    running.clear(order[i].queries.count);
    const size_t next = i + team.threads();
    if (order[i].tokens() > 0) attend(order[i], next < order.size() ? order[next] : Part{order[i].queries, 0, 0, 0}, running);
  });
  team.run(shape.rows, double(parts.size()) * numbers, [&](int r) {
    const auto [first, last] = parts_of[r];
    const auto part_of = [&](int p) { return running_of(parts[p]).query(r - parts[p].queries.first); };
    for (int n = 0; n < heads; n++) {
      float top = kNever, total = 0;
      for (int p = first; p < last; p++) top = std::max(top, part_of(p).top[n]);
      for (int p = first; p < last; p++) total += part_of(p).total[n] * std::exp(part_of(p).top[n] - top);
      float* to = out + r * numbers + size_t(n) * size;
      const bool empty = !(total != 0);  // NaN counts as something
      for (int p = first; p < last; p++) {
        const Running part = part_of(p);
        const float scale = empty ? 0 : std::exp(part.top[n] - top) / total;
        for (int i = 0; i < size; i++) {
          const float own = part.out[size_t(n) * size + i] * scale;
          to[i] = p == first ? own : to[i] + own;
        }
      }
      lse[size_t(r) * heads + n] = empty ? kNever : top + std::log(total);
    }
  });
}

// Rows that have no neighbours.
inline std::vector<Neighbours> alone(int rows) {
  std::vector<Neighbours> found;
  for (int r = 0; r < rows; r++) found.push_back({r, 1});
  return found;
}

// The tables of a row r are `key_blocks(r)` and `value_blocks(r)`.
template <class Number, class KeyBlocks, class ValueBlocks>
void kv_decode(Team& team, const Shape& shape, const std::vector<Neighbours>& rows, const float* q,
               const Pages<Number>& pool, const KeyBlocks& key_blocks, const ValueBlocks& value_blocks,
               const int32_t* length, float* out, float* lse) {
  attend_rows(team, shape, shape.width / shape.heads, rows, length, out, lse,
              [&](const Part& part, const Part& next, Running& running) {
                kv_part(shape, q + size_t(part.queries.first) * shape.width, pool, key_blocks, value_blocks, part, next,
                        running);
              });
}

// Queries, float32 or X, are multiplied as X.
template <class X, class Query, class Number, class Blocks>
void hidden_decode(Team& team, const Shape& shape, const std::vector<Neighbours>& rows, const Query* q,
                   const Pages<Number>& pool, const Blocks& blocks, const int32_t* length, float* out, float* lse) {
  const int D = shape.width;
  attend_rows(team, shape, D, rows, length, out, lse, [&](const Part& part, const Part& next, Running& running) {
    hidden_part<X>(shape, q + size_t(part.queries.first) * shape.heads * D, pool, blocks, part, next, running);
  });
}

}  // namespace apt
