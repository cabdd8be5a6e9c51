// One query per request over its cached tokens, read where they lie: pages of the pool `[pages, page_tokens, D]`.
//
// KV rows go head by head over keys and values; hidden rows take wide queries, of D numbers for each head, over the
// hidden vectors themselves. Both keep a running softmax over kTokens tokens at a time. A number beyond a row's length
// is never used, whatever it holds.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kTokens = 64;
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kHeads = 2;  // of which the sums with four tokens stay in registers
#else
constexpr int kHeads = 4;
#endif

struct Shape {
  int rows, heads, width, page_tokens;  // width: D
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

// out [M, size] += weights [M, kTokens] times values [tokens, size], of which kVectors vectors at `from`.
template <int M, int kVectors, class Number>
inline void add_values(const float* weights, const Number* values, size_t step, int tokens, float* out, size_t out_step) {
  Vector sums[M][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) sums[m][i] = load(out + m * out_step + i * kLanes);
  for (int t = 0; t < tokens; t++) {
    Vector own[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) own[i] = load_as_float(values + t * step + i * kLanes);
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

// scores [M, kTokens] of queries [M, size] and four tokens, numbers of which are `step` apart.
template <int M, class Number>
__attribute__((noinline)) void four_scores(const float* q, const Number* x, size_t step, int size, float* scores) {
  Vector sums[M][4] = {};
  int at = 0;
  for (; at + kLanes <= size; at += kLanes)
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
      const Vector own = load_as_float(x + i * step + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[m][i] += load(q + size_t(m) * size + at) * own;
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    float* to = scores + m * kTokens;
    sum_four(sums[m][0], sums[m][1], sums[m][2], sums[m][3], to);
    for (int i = 0; i < 4; i++)
      for (int rest = at; rest < size; rest++) to[i] += q[size_t(m) * size + rest] * to_float(x[i * step + rest]);
  }
}

// The same of up to four.
template <int M, class Number>
inline void few_scores(const float* q, const Number* x, size_t step, int tokens, int size, float* scores) {
  if (tokens >= 4) return four_scores<M>(q, x, step, size, scores);
  for (int m = 0; m < M; m++)
    for (int i = 0; i < tokens; i++) scores[m * kTokens + i] = dot(q + size_t(m) * size, x + i * step, size);
}

template <int M, class Number>
inline void add_all_values(const float* weights, const Number* values, size_t step, int tokens, int size, float* out,
                           size_t out_step) {
  int at = 0;
  for (; at + 4 * kLanes <= size; at += 4 * kLanes)
    add_values<M, 4>(weights, values + at, step, tokens, out + at, out_step);
  for (; at + kLanes <= size; at += kLanes)
    add_values<M, 1>(weights, values + at, step, tokens, out + at, out_step);
  for (; at < size; at++)
    for (int m = 0; m < M; m++)
      for (int t = 0; t < tokens; t++) out[m * out_step + at] += weights[m * kTokens + t] * to_float(values[t * step + at]);
}

// Tokens `[begin, end)` of a row as they lie in its `blocks`, page by page: `visit(numbers, first token - begin, tokens)`.
template <class Number, class Visit>
void each_page(const Shape& shape, const Number* pool, const int32_t* blocks, int begin, int end, const Visit& visit) {
  for (int t = begin; t < end;) {
    const int inside = t % shape.page_tokens, count = std::min(shape.page_tokens - inside, end - t);
    visit(pool + (size_t(blocks[t / shape.page_tokens]) * shape.page_tokens + inside) * shape.width, t - begin, count);
    t += count;
  }
}

// Tokens `[begin, end)` of one KV row: q `[heads, head_dim]`.
template <class Number>
void kv_part(const Shape& shape, const float* q, const Number* pool, const int32_t* key_blocks,
             const int32_t* value_blocks, int begin, int end, Running& running) {
  struct Page {
    const Number* numbers;
    int at, count;  // of the kTokens at a time
    bool keys;
  };
  const int D = shape.width, H = D / shape.heads;
  thread_local std::vector<float> scores;
  thread_local std::vector<Page> pages;
  scores.resize(size_t(shape.heads) * kTokens);
  pages.clear();
  for (int first = begin; first < end; first += kTokens)
    for (const bool keys : {true, false})
      each_page(shape, pool, keys ? key_blocks : value_blocks, first, std::min(first + kTokens, end),
                [&](const Number* numbers, int at, int count) { pages.push_back({numbers, at, count, keys}); });
  for (size_t i = 0; i < pages.size(); i++) {
    const Page& own = pages[i];
    const char* next = reinterpret_cast<const char*>(pages[std::min(i + 1, pages.size() - 1)].numbers);
    const int share = own.count * D * int(sizeof(Number)) / (own.keys ? (own.count + 3) / 4 * shape.heads : shape.heads);
    const auto bring = [&] {
      for (int line = 0; line < share; line += 64) __builtin_prefetch(next + line, 0, 2);
      next += share;
    };
    if (own.keys) {
      for (int t = 0; t < own.count; t += 4)
        for (int n = 0; n < shape.heads; n++) {
          bring();
          few_scores<1>(q + n * H, own.numbers + size_t(t) * D + n * H, D, own.count - t, H,
                        scores.data() + size_t(n) * kTokens + own.at + t);
        }
      if (!pages[i + 1].keys) running.weigh(scores.data(), own.at + own.count);
      continue;
    }
    for (int n = 0; n < shape.heads; n++) {
      bring();
      add_all_values<1>(scores.data() + size_t(n) * kTokens + own.at, own.numbers + n * H, D, own.count, H,
                        running.out + n * H, H);
    }
  }
}

// Tokens `[begin, end)` of one hidden row: q `[heads, D]`.
template <class Number>
void hidden_part(const Shape& shape, const float* q, const Number* pool, const int32_t* blocks, int begin, int end,
                 Running& running, std::vector<float>& buffer) {
  const int D = shape.width;
  std::vector<float> scores(size_t(shape.heads) * kTokens);
  buffer.resize(size_t(kTokens) * D);
  for (int first = begin; first < end; first += kTokens) {
    const int last = std::min(first + kTokens, end), tokens = last - first;
    each_page(shape, pool, blocks, first, last, [&](const Number* page, int at, int count) {
      for (int i = 0; i < count * D; i++) buffer[size_t(at) * D + i] = to_float(page[i]);
    });
    for (int t = 0; t < tokens; t += 4) {
      const float* x = buffer.data() + size_t(t) * D;
      float* to = scores.data() + t;
      int n = 0;
      for (; n + kHeads <= shape.heads; n += kHeads)
        few_scores<kHeads>(q + size_t(n) * D, x, D, tokens - t, D, to + size_t(n) * kTokens);
      for (; n < shape.heads; n++)
        few_scores<1>(q + size_t(n) * D, x, D, tokens - t, D, to + size_t(n) * kTokens);
    }
    running.weigh(scores.data(), tokens);
    for (int at = 0; at < D; at += 4 * kLanes) {
      const int size = std::min(4 * kLanes, D - at);
      int n = 0;
      for (; n + 4 <= shape.heads; n += 4)
        add_all_values<4>(scores.data() + size_t(n) * kTokens, buffer.data() + at, D, tokens, size,
                          running.out + size_t(n) * D + at, D);
      for (; n < shape.heads; n++)
        add_all_values<1>(scores.data() + size_t(n) * kTokens, buffer.data() + at, D, tokens, size,
                          running.out + size_t(n) * D + at, D);
    }
  }
}

// Rows of `length` tokens in parts that threads share, and their parts merged: `attend(row, begin, end, running)`.
// out `[rows, heads, size]` and lse `[rows, heads]`; zeros and kNever for a row of length 0.
inline void attend_rows(Team& team, const Shape& shape, int size, const int32_t* length, float* out, float* lse,
                        const std::function<void(int, int, int, Running&)>& attend) {
  const int heads = shape.heads, wanted = 4 * static_cast<int>(team.threads());
  const size_t numbers = size_t(heads) * size;
  struct Part {
    int row, begin, end;
    size_t scratch;
  };
  std::vector<Part> parts;
  std::vector<int> first(shape.rows + 1);
  const int split = std::max(1, wanted / std::max(shape.rows, 1));
  for (int r = 0; r < shape.rows; r++) {
    first[r] = parts.size();
    const int tokens = std::max((length[r] + split - 1) / split, 2 * kTokens);
    for (int begin = 0; begin < std::max(length[r], 1); begin += tokens)
      parts.push_back({r, begin, std::min(begin + tokens, length[r]), parts.size()});
  }
  first[shape.rows] = parts.size();
  std::vector<float> tops(parts.size() * heads), totals(parts.size() * heads);
  const bool direct = parts.size() == size_t(shape.rows);
  std::vector<float> sums(direct ? 0 : parts.size() * numbers);
  const auto running_of = [&](const Part& part) {
    float* own = direct ? out + part.row * numbers : sums.data() + part.scratch * numbers;
    return Running{tops.data() + part.scratch * heads, totals.data() + part.scratch * heads, own, heads, size};
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
void kv_decode(Team& team, const Shape& shape, const float* q, const Number* pool, const KeyBlocks& key_blocks,
               const ValueBlocks& value_blocks, const int32_t* length, float* out, float* lse) {
  attend_rows(team, shape, shape.width / shape.heads, length, out, lse, [&](int r, int begin, int end, Running& running) {
    kv_part(shape, q + size_t(r) * shape.width, pool, key_blocks(r), value_blocks(r), begin, end, running);
  });
}

template <class Number, class Blocks>
void hidden_decode(Team& team, const Shape& shape, const float* q, const Number* pool, const Blocks& blocks,
                   const int32_t* length, float* out, float* lse) {
  const int D = shape.width;
  attend_rows(team, shape, D, length, out, lse, [&](int r, int begin, int end, Running& running) {
    thread_local std::vector<float> buffer;
    hidden_part(shape, q + size_t(r) * shape.heads * D, pool, blocks(r), begin, end, running, buffer);
  });
}

}  // namespace apt
