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

// q as it is multiplied with tokens.
inline const float* as_factors(const float* q, int, std::vector<float>&) { return q; }
inline const BFloat16* as_factors(const float* q, int size, std::vector<BFloat16>& room) {
  room.resize(size);
  for (int i = 0; i < size; i++) from_float(q[i], &room[i]);
  return room.data();
}

// scores [M, kTokens] of queries [M, size] and four tokens' numbers from `from` on.
template <int M, class X, class Number>
__attribute__((noinline)) void four_scores(const X* q, const Number* const* tokens, size_t from, int size,
                                           float* scores) {
  Vector sums[M][4] = {};
  int at = 0;
  if constexpr (std::is_same_v<X, BFloat16>)
    for (; at + 2 * kLanes <= size; at += 2 * kLanes)
#pragma GCC unroll 8
      for (int i = 0; i < 4; i++) {
        const Bits own = load_pairs(tokens[i] + from + at);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sums[m][i] = add_products(sums[m][i], load_pairs(q + size_t(m) * size + at), own);
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

// Tokens `[begin, end)` of one KV row: q `[heads, head_dim]`.
template <class Number>
void kv_part(const Shape& shape, const float* q, const Pages<Number>& pool, const int32_t* key_blocks,
             const int32_t* value_blocks, int begin, int end, Running& running) {
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
  for (int first = begin; first < end; first += kTokens)
    for (const bool keys : {true, false})
      each_page(shape, pool, keys ? key_blocks : value_blocks, first, std::min(first + kTokens, end),
                [&](const Number* numbers, const float* scales, int at, int count) {
                  pages.push_back({numbers, scales, at, count, keys});
                });
  for (size_t i = 0; i < pages.size(); i++) {
    const Page& own = pages[i];
    const Number* tokens[kTokens];
    for (int t = 0; t < own.count; t++) tokens[t] = own.numbers + size_t(t) * D;
    const char* next = reinterpret_cast<const char*>(pages[std::min(i + 1, pages.size() - 1)].numbers);
    const int pieces = own.keys ? (own.count + 3) / 4 * shape.heads : shape.heads;
    const int share = own.count * D * int(sizeof(Number)) / pieces;
    if (own.keys) {
      for (int t = 0; t < own.count; t += 4)
        for (int n = 0; n < shape.heads; n++, next += share) {
          bring(next, share);
          float* to = scores.data() + size_t(n) * kTokens + own.at + t;
          const int count = std::min(own.count - t, 4);
          few_scores<1>(queries + n * H, tokens + t, n * H, count, H, to);
          if constexpr (kCodes)
            for (int i = 0; i < count; i++) to[i] *= own.scales[n * shape.page_tokens + t + i];
        }
      if (!pages[i + 1].keys) running.weigh(scores.data(), own.at + own.count);
      continue;
    }
    for (int n = 0; n < shape.heads; n++, next += share) {
      bring(next, share);
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

// Tokens `[begin, end)` of one hidden row: q `[heads, D]`, multiplied as X.
template <class X, class Number>
void hidden_part(const Shape& shape, const float* q, const Pages<Number>& pool, const int32_t* blocks, int begin,
                 int end, Running& running) {
  constexpr bool kCodes = std::is_same_v<Number, int8_t>;
  const int D = shape.width, N = shape.heads;
  thread_local std::vector<float> scores, scales;
  thread_local std::vector<const Number*> all;
  thread_local std::vector<X> room, widened;
  const auto* queries = as_factors(q, N * D, room);
  scores.resize(size_t(N) * kTokens);
  if (kCodes) widened.resize(size_t(4) * D);
  all.clear(), scales.clear();
  each_page(shape, pool, blocks, begin, end, [&](const Number* page, const float* of_page, int, int count) {
    for (int t = 0; t < count; t++) {
      all.push_back(page + size_t(t) * D);
      if (kCodes) scales.push_back(of_page[t]);
    }
  });
  if (kCodes) scales.resize(all.size() + kTokens);  // whole vectors of them
  const auto scale = [&](int first) {
    for (int n = 0; kCodes && n < N; n++)
      for (int t = 0; t < kTokens; t += kLanes) {
        float* own = scores.data() + size_t(n) * kTokens + t;
        store(own, load(own) * load(scales.data() + first + t));
      }
  };
  const int share = (D * int(sizeof(Number)) + N / kHeads) / (N / kHeads + 1);
  for (int first = 0; first < int(all.size()); first += kTokens) {
    const int left = all.size() - first, count = std::min(kTokens, left);
    const Number* const* tokens = all.data() + first;
    for (int t = 0; t < count; t += 4) {
      float* to = scores.data() + t;
      const X* multiplied[4];
      if constexpr (kCodes)
        for (int i = 0; i < std::min(4, count - t); i++)
          multiplied[i] = as_multiplied(tokens[t + i], D, widened.data() + size_t(i) * D);
      in_groups<kHeads, 1>(N, [&]<int M>(int n, std::integral_constant<int, M>) {
        for (int i = t + kTokens; i < std::min(t + kTokens + 4, left); i++)
          bring(reinterpret_cast<const char*>(tokens[i]) + n / kHeads * share, share);
        if constexpr (kCodes)
          few_scores<M>(queries + size_t(n) * D, multiplied, 0, count - t, D, to + size_t(n) * kTokens);
        else
          few_scores<M>(queries + size_t(n) * D, tokens + t, 0, count - t, D, to + size_t(n) * kTokens);
      });
    }
    scale(first);
    running.weigh(scores.data(), count);
    scale(first);
    constexpr int kPart = kValueVectors * kLanes;
    for (int at = 0; at < D; at += kPart)
      in_groups<kValueHeads, 4, 1>(N, [&]<int M>(int n, std::integral_constant<int, M>) {
        add_all_values<M, kValueVectors>(scores.data() + size_t(n) * kTokens, tokens, at, count,
                                         std::min(kPart, D - at), running.out + size_t(n) * D + at, D);
      });
  }
}

// Rows of `length` tokens in parts that threads share, and their parts merged: `attend(row, begin, end, running)`. Where
// parts end depends on the length alone, so a row's results do not depend on other rows or on the number of threads.
// out `[rows, heads, size]` and lse `[rows, heads]`; zeros and kNever for a row of length 0.
inline void attend_rows(Team& team, const Shape& shape, int size, const int32_t* length, float* out, float* lse,
                        const std::function<void(int, int, int, Running&)>& attend) {
  const int heads = shape.heads;
  const size_t numbers = size_t(heads) * size;
  struct Part {
    int row, begin, end;
    size_t number, apart;  // of all; of those in rows with several, from 1 on
  };
  std::vector<Part> parts;
  std::vector<int> first(shape.rows + 1);
  size_t apart = 0;  // parts of rows that have several
  for (int r = 0; r < shape.rows; r++) {
    first[r] = parts.size();
    const int tokens = std::max((length[r] + kParts - 1) / kParts, 2 * kTokens);
    for (int begin = 0; begin < std::max(length[r], 1); begin += tokens)
      parts.push_back({r, begin, std::min(begin + tokens, length[r]), parts.size(), length[r] > tokens ? ++apart : 0});
  }
  first[shape.rows] = parts.size();
  std::vector<float> tops(parts.size() * heads), totals(parts.size() * heads);
  thread_local Scratch scratch;
  float* sums = scratch.of(apart * numbers);
  const auto running_of = [&](const Part& part) {
    float* own = part.apart ? sums + (part.apart - 1) * numbers : out + part.row * numbers;
    return Running{tops.data() + part.number * heads, totals.data() + part.number * heads, own, heads, size};
  };
  std::vector<Part> order = parts;
  std::stable_sort(order.begin(), order.end(), [](const Part& a, const Part& b) { return a.end - a.begin > b.end - b.begin; });
  double tokens = 0;
  for (int r = 0; r < shape.rows; r++) tokens += length[r];
  team.run(order.size(), 2 * tokens * numbers, [&](int i) {
    Running running = running_of(order[i]);
    running.clear();
    if (order[i].end > order[i].begin) attend(order[i].row, order[i].begin, order[i].end, running);
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
  attend_rows(team, shape, shape.width / shape.heads, length, out, lse, [&](int r, int begin, int end, Running& running) {
    kv_part(shape, q + size_t(r) * shape.width, pool, key_blocks(r), value_blocks(r), begin, end, running);
  });
}

// Queries are multiplied as X.
template <class X, class Number, class Blocks>
void hidden_decode(Team& team, const Shape& shape, const float* q, const Pages<Number>& pool, const Blocks& blocks,
                   const int32_t* length, float* out, float* lse) {
  const int D = shape.width;
  attend_rows(team, shape, D, length, out, lse, [&](int r, int begin, int end, Running& running) {
    hidden_part<X>(shape, q + size_t(r) * shape.heads * D, pool, blocks(r), begin, end, running);
  });
}

}  // namespace apt
