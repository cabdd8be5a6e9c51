// Each token of packed requests over the tokens of its own request up to itself: flash attention.
//
// Queries are the lanes of vectors: kPanel of one request and head at a time, so that the softmax is the same for all
// lanes, and weights come out as the panel that values are multiplied with. q, k, v `[tokens, heads, size]`.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "matmul.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kKeysAtOnce = 8 * kTallest;

// A request's neighbouring slots `[begin, end)`. Of one head its keys are packed in tiles `[size, keys]`, its values in
// tiles `[keys, numbers]`.
struct Segment {
  int begin, end;

  int tokens() const { return end - begin; }
};

inline std::vector<Segment> segments_of(const int32_t* row, int tokens) {
  std::vector<Segment> found;
  for (int t = 0; t < tokens; t++)
    if (t == 0 || row[t] != row[t - 1])
      found.push_back({t, t + 1});
    else
      found.back().end = t + 1;
  return found;
}

// rows [count, size], each `step` from the next, -> out [size, count] with rows `out_step` apart.
inline void turn_rows(const float* rows, size_t step, int count, int size, float* out, int out_step) {
  for (int m = 0; m < count; m++)
    for (int i = 0; i < size; i++) out[size_t(i) * out_step + m] = rows[m * step + i];
}

// The queries `[first, first + count)`, at most kPanel, of one head over their request's keys and values, which `k` and
// `v` hold as in Segment. Queries and results are `step` numbers apart, lse `heads`.
inline void attend_panel(const Segment& segment, const float* q, const float* k, const float* v, int first, int count,
                         int size, size_t step, int heads, float* out, float* lse) {
  alignas(64) float scores[kKeysAtOnce * kPanel], top[kPanel], total[kPanel], queries_at[kPanel];
  thread_local std::vector<float> buffer;
  buffer.assign(size_t(2) * size * kPanel, 0.0f);
  float *queries = buffer.data(), *sums = queries + size_t(size) * kPanel;
  turn_rows(q, step, count, size, queries, kPanel);
  std::fill_n(top, kPanel, -1e30f);
  std::fill_n(total, kPanel, 0.0f);
  for (int lane = 0; lane < kPanel; lane++) queries_at[lane] = float(first + lane - segment.begin);
  const int seen = first + count - segment.begin;  // keys that any of the queries sees
  const Tiles key_tiles(segment.tokens()), number_tiles(size);
  const Vector never = Vector{} - std::numeric_limits<float>::infinity();
  for (int i = 0; i < key_tiles.count && key_tiles.first(i) < seen;) {
    const int begin = key_tiles.first(i);
    int keys = 0;
    for (; i < key_tiles.count && begin + keys < seen && keys + key_tiles.rows(i) <= kKeysAtOnce; i++) {
      panel_tile_of(key_tiles.rows(i), k + size_t(begin + keys) * size, queries, size, scores + keys * kPanel, kPanel,
                    false, reinterpret_cast<const char*>(queries), 0);
      keys += key_tiles.rows(i);
    }
    Vector keep[kVectors];
    for (int lane = 0; lane < kVectors; lane++) {
      float* own = scores + lane * kLanes;
      const Vector at = load(queries_at + lane * kLanes), before = load(top + lane * kLanes);
      Vector greatest = before;
      for (int t = 0; t < keys; t++) {
        Vector score = load(own + t * kPanel);
        if (begin + t > first - segment.begin) {
          score = Vector{} + float(begin + t) > at ? never : score;
          store(own + t * kPanel, score);
        }
        greatest = greatest > score ? greatest : score;
      }
      keep[lane] = exp(before - greatest);
      Vector sum = load(total + lane * kLanes) * keep[lane];
      for (int t = 0; t < keys; t++) {
        const Vector weight = exp(load(own + t * kPanel) - greatest);
        store(own + t * kPanel, weight);
        sum += weight;
      }
      store(top + lane * kLanes, greatest);
      store(total + lane * kLanes, sum);
    }
    for (int h = 0; h < size && begin > 0; h++)
      for (int lane = 0; lane < kVectors; lane++) {
        float* own = sums + h * kPanel + lane * kLanes;
        store(own, load(own) * keep[lane]);
      }
    for (int j = 0; j < number_tiles.count; j++) {
      const int h = number_tiles.first(j), numbers = number_tiles.rows(j);
      const float* values = v + size_t(h) * segment.tokens() + size_t(begin) * numbers;
      panel_tile_of(numbers, values, scores, keys, sums + h * kPanel, kPanel, true,
                    reinterpret_cast<const char*>(scores), 0);
    }
  }
  for (int lane = 0; lane < count; lane++) {
    const float scale = 1 / total[lane];
    for (int h = 0; h < size; h++) out[lane * step + h] = sums[h * kPanel + lane] * scale;
    lse[size_t(lane) * heads] = top[lane] + std::log(total[lane]);
  }
}

inline void attend_chunk(Team& team, const float* q, const float* k, const float* v, const int32_t* row,
                         int tokens, int heads, int size, float* out, float* lse) {
  const size_t step = size_t(heads) * size, of_head = size_t(tokens) * size;
  const std::vector<Segment> segments = segments_of(row, tokens);
  const int count = segments.size();
  thread_local Scratch scratch;
  float *keys = scratch.of(2 * tokens * step), *values = keys + tokens * step;
  team.run(count * heads, 2.0 * tokens * step, [&](int i) {
    const int n = i % heads;
    const Segment& own = segments[i / heads];
    const size_t from = own.begin * step + size_t(n) * size, to = n * of_head + size_t(own.begin) * size;
    const Tiles key_tiles(own.tokens()), number_tiles(size);
    for (int j = 0; j < key_tiles.count; j++) {
      const int t = key_tiles.first(j), rows = key_tiles.rows(j);
      turn_rows(k + from + t * step, step, rows, size, keys + to + size_t(t) * size, rows);
    }
    for (int j = 0; j < number_tiles.count; j++) {
      const int h = number_tiles.first(j), numbers = number_tiles.rows(j);
      float* tile = values + to + size_t(h) * own.tokens();
      for (int t = 0; t < own.tokens(); t++) std::copy_n(v + from + t * step + h, numbers, tile + size_t(t) * numbers);
    }
  });
  struct Panel {
    int segment, first, count;
  };
  std::vector<Panel> panels;
  double pairs = 0;
  for (int s = 0; s < count; s++)
    for (int t = segments[s].begin; t < segments[s].end; t += kPanel) {
      panels.push_back({s, t, std::min(kPanel, segments[s].end - t)});
      pairs += double(t - segments[s].begin + kPanel) * kPanel;
    }
  team.run(panels.size() * heads, 2 * pairs * step, [&](int i) {
    const Panel& own = panels[panels.size() - 1 - i / heads];  // the longest of a request first
    const Segment& segment = segments[own.segment];
    const int n = i % heads;
    const size_t at = n * of_head + size_t(segment.begin) * size, from = own.first * step + size_t(n) * size;
    attend_panel(segment, q + from, keys + at, values + at, own.first, own.count, size, step, heads,
                 out + from, lse + size_t(own.first) * heads + n);
  });
}

}  // namespace apt
