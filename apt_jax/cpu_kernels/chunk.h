// Each token of a chunk over its request's cached prefix and the chunk's tokens up to itself: flash attention.
//
// Queries are the lanes of vectors: kPanel of one request and head at a time, so that the softmax is the same for all
// lanes, and weights come out as the panel that values are multiplied with.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "matmul.h"
#include "threads.h"
#include "vectors.h"

namespace apt {

constexpr int kKeysAtOnce = 8 * kTallest;

// The neighbouring tokens `[begin, begin + tokens)` of one request, after `prefix` that are cached.
struct Chunk {
  int begin, tokens, prefix;

  int keys() const { return prefix + tokens; }
};

// The chunks of packed requests, whose tokens have the same number in `row`.
inline std::vector<Chunk> chunks_of(const int32_t* row, int tokens) {
  std::vector<Chunk> found;
  for (int t = 0; t < tokens; t++)
    if (t == 0 || row[t] != row[t - 1])
      found.push_back({t, 1, 0});
    else
      found.back().tokens++;
  return found;
}

// Keys `row(t) [size]` of one head in tiles `[size, keys of the tile]`.
template <class Row>
void pack_keys(int keys, int size, const Row& row, float* out) {
  const Tiles tiles(keys);
  for (int i = 0; i < tiles.count; i++) {
    const int first = tiles.first(i);
    turn([&](int t) { return row(first + t); }, tiles.rows(i), size, out + size_t(first) * size, tiles.rows(i));
  }
}

// Values `row(t) [size]` of one head in tiles `[keys, numbers of the tile]`.
template <class Row>
void pack_values(int keys, int size, const Row& row, float* out) {
  const Tiles tiles(size);
  for (int t = 0; t < keys; t++) {
    const auto* own = row(t);
    for (int i = 0; i < tiles.count; i++) {
      const int first = tiles.first(i), numbers = tiles.rows(i);
      float* to = out + size_t(first) * keys + size_t(t) * numbers;
      for (int h = 0; h < numbers; h++) to[h] = to_float(own[first + h]);
    }
  }
}

// The chunk's queries `[first, first + count)`, at most kPanel, of one head over packed keys and values. Queries and
// results are `step` numbers apart; lse, `heads` apart, may be null.
inline void attend_panel(const Chunk& chunk, const float* q, const float* k, const float* v, int first, int count,
                         int size, size_t step, int heads, float* out, float* lse) {
  alignas(64) float scores[kKeysAtOnce * kPanel], top[kPanel], total[kPanel], queries_at[kPanel];
  thread_local std::vector<float> buffer;
  buffer.assign(size_t(2) * size * kPanel, 0.0f);
  float *queries = buffer.data(), *sums = queries + size_t(size) * kPanel;
  turn([&](int m) { return q + m * step; }, count, size, queries, kPanel);
  std::fill_n(top, kPanel, kNever);
  std::fill_n(total, kPanel, 0.0f);
  const int position = chunk.prefix + first, seen = position + count;  // keys that any of the queries sees
  for (int lane = 0; lane < kPanel; lane++) queries_at[lane] = float(position + lane);
  const Tiles key_tiles(chunk.keys()), number_tiles(size);
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
        if (begin + t > position) {
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
      const float* values = v + size_t(h) * chunk.keys() + size_t(begin) * numbers;
      panel_tile_of(numbers, values, scores, keys, sums + h * kPanel, kPanel, true,
                    reinterpret_cast<const char*>(scores), 0);
    }
  }
  for (int lane = 0; lane < count; lane++) {
    const float scale = 1 / total[lane];
    for (int h = 0; h < size; h++) out[lane * step + h] = sums[h * kPanel + lane] * scale;
    if (lse) lse[size_t(lane) * heads] = top[lane] + std::log(total[lane]);
  }
}

// q and out `[tokens, heads, size]`, lse `[tokens, heads]` or null. `pack(c, n, keys, values)` packs those of chunk c and
// head n.
inline void attend_chunks(Team& team, const std::vector<Chunk>& chunks, const float* q, int heads, int size, float* out,
                          float* lse, const std::function<void(int, int, float*, float*)>& pack) {
  struct Panel {
    int chunk, first, count;  // first: of the chunk's tokens
  };
  const int count = chunks.size();
  const size_t step = size_t(heads) * size;
  std::vector<size_t> keys_before{0};
  std::vector<Panel> panels;
  double pairs = 0;
  for (int c = 0; c < count; c++) {
    keys_before.push_back(keys_before.back() + chunks[c].keys());
    for (int t = 0; t < chunks[c].tokens; t += kPanel) {
      panels.push_back({c, t, std::min(kPanel, chunks[c].tokens - t)});
      pairs += double(chunks[c].prefix + t + kPanel) * kPanel;
    }
  }
  const size_t all_keys = keys_before.back();
  thread_local Scratch scratch;
  float *keys = scratch.of(2 * all_keys * step), *values = keys + all_keys * step;
  const auto packed = [&](int c, int n) { return (n * all_keys + keys_before[c]) * size; };
  team.run(count * heads, 2.0 * all_keys * step, [&](int i) {
    const int c = i / heads, n = i % heads;
    pack(c, n, keys + packed(c, n), values + packed(c, n));
  });
  team.run(panels.size() * heads, 2 * pairs * step, [&](int i) {
    const Panel& own = panels[panels.size() - 1 - i / heads];  // the longest of a request first
    const Chunk& chunk = chunks[own.chunk];
    const int n = i % heads, token = chunk.begin + own.first;
    const size_t at = packed(own.chunk, n), from = token * step + size_t(n) * size;
    attend_panel(chunk, q + from, keys + at, values + at, own.first, own.count, size, step, heads, out + from,
                 lse ? lse + size_t(token) * heads + n : nullptr);
  });
}

}  // namespace apt
