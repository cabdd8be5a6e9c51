// Each token of a chunk over its request's cached prefix and the chunk's tokens up to itself: flash attention.
//
// Queries are the lanes of vectors: kPackedWidth of one request and head at a time, so that the softmax is the same for
// all lanes, and weights come out as the packed tile that values are multiplied with.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "matmul.h"
#include "memory.h"
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

// What keys of a head take, and values: of bfloat16 two tokens lie side by side.
template <class X>
inline size_t packed_size(int keys, int size) {
  return size_t((keys + kInStep<X> - 1) / kInStep<X> * kInStep<X>) * size;
}

// Tiles of a chunk's keys, whole ones but for the last: where they end does not depend on the number of keys, so neither
// do the steps in which a query attends to keys, nor its result.
struct KeyTiles {
  int keys, count;

  explicit KeyTiles(int keys) : keys(keys), count((keys + kTallest - 1) / kTallest) {}
  int first(int i) const { return i * kTallest; }
  int rows(int i) const { return std::min(kTallest, keys - first(i)); }
};

// Keys `row(t) [size]` of one head in tiles `[size, keys of the tile]`, of bfloat16 `[size / 2, keys of the tile, 2]`.
template <class Row, class X>
void pack_keys(int keys, int size, const Row& row, X* out) {
  const KeyTiles tiles(keys);
  for (int i = 0; i < tiles.count; i++) {
    const int first = tiles.first(i);
    transpose([&](int t) { return row(first + t); }, tiles.rows(i), size, out + size_t(first) * size, tiles.rows(i));
  }
}

// Values `row(t) [size]` of one head in tiles `[keys, numbers of the tile]`, of bfloat16
// `[keys / 2, numbers of the tile, 2]`.
template <class Row, class X>
void pack_values(int keys, int size, const Row& row, X* out) {
  constexpr int kWide = kInStep<X>;
  const Tiles tiles(size);
  const int whole = keys / kWide, all = packed_size<X>(keys, 1);
  const auto put = [&](int step, const auto& number) {
    for (int i = 0; i < tiles.count; i++) {
      const int first = tiles.first(i), numbers = tiles.rows(i);
      X* to = out + size_t(first) * all + size_t(step) * numbers * kWide;
      for (int h = 0; h < numbers; h++)
        for (int w = 0; w < kWide; w++) from_float(number(w, first + h), to + h * kWide + w);
    }
  };
  for (int step = 0; step < whole; step++) {
    const auto own = row(step * kWide), next = row(step * kWide + kWide - 1);
    put(step, [&](int w, int i) { return to_float(w ? next[i] : own[i]); });
  }
  if (keys % kWide) put(whole, [&, own = row(keys - 1)](int w, int i) { return w ? 0.0f : to_float(own[i]); });
}

// Weights `[keys, kPackedWidth]` of the keys from `begin` on as a packed tile of X, in `room` if need be, and its number
// of steps. Of bfloat16 it begins at an even key, and what completes a pair is 0.
template <class X>
std::pair<const X*, int> packed_weights(const float* weights, int begin, int keys, X* room) {
  if constexpr (std::is_same_v<X, float>) {
    return {weights, keys};
  } else {
    const int before = begin % 2, steps = (before + keys + 1) / 2;
    const auto of_key = [&](int t, int lane) {
      return t < 0 || t >= keys ? Vector{} : load(weights + size_t(t) * kPackedWidth + lane);
    };
    for (int i = 0; i < steps; i++)
      for (int lane = 0; lane < kPackedWidth; lane += kLanes) {
        const Bits pairs = in_pairs(of_key(2 * i - before, lane), of_key(2 * i + 1 - before, lane));
        std::memcpy(room + (size_t(i) * kPackedWidth + lane) * 2, &pairs, sizeof pairs);
      }
    return {room, steps};
  }
}

// The chunk's queries `[first, first + count)`, at most kPackedWidth, of one head over packed keys and values.
// Queries and results are `step` numbers apart; lse, `heads` apart, may be null.
template <class X>
void attend_queries(const Chunk& chunk, const float* q, const X* k, const X* v, int first, int count, int size,
                    size_t step, int heads, float* out, float* lse) {
  constexpr int kWide = kInStep<X>;
  alignas(64) float scores[kKeysAtOnce * kPackedWidth], top[kPackedWidth], total[kPackedWidth];
  alignas(64) float queries_at[kPackedWidth];
  alignas(64) X room[kWide == 1 ? 1 : (kKeysAtOnce + 2) * kPackedWidth];
  thread_local Aligned<float> buffer;
  buffer.assign(size_t(2) * size * kPackedWidth, 0.0f);
  float* sums = buffer.data();
  X* queries = reinterpret_cast<X*>(sums + size_t(size) * kPackedWidth);
  transpose([&](int m) { return q + m * step; }, count, size, queries, kPackedWidth);
  std::fill_n(top, kPackedWidth, kNever);
  std::fill_n(total, kPackedWidth, 0.0f);
  const int position = chunk.prefix + first, seen = position + count;  // keys that any of the queries sees
  for (int lane = 0; lane < kPackedWidth; lane++) queries_at[lane] = float(position + lane);
  const KeyTiles key_tiles(chunk.keys());
  const Tiles number_tiles(size);
  const Vector never = Vector{} - std::numeric_limits<float>::infinity();
  for (int i = 0; i < key_tiles.count && key_tiles.first(i) < seen;) {
    const int begin = key_tiles.first(i);
    int keys = 0;
    for (; i < key_tiles.count && begin + keys < seen && keys + key_tiles.rows(i) <= kKeysAtOnce; i++) {
      multiply_tile_of(key_tiles.rows(i), k + size_t(begin + keys) * size, queries, size / kWide,
                       scores + keys * kPackedWidth, kPackedWidth, false, reinterpret_cast<const char*>(queries), 0);
      keys += key_tiles.rows(i);
    }
    Vector keep[kVectors];
    for (int lane = 0; lane < kVectors; lane++) {
      float* own = scores + lane * kLanes;
      const Vector at = load(queries_at + lane * kLanes), before = load(top + lane * kLanes);
      Vector greatest = before;
      for (int t = 0; t < keys; t++) {
        Vector score = load(own + t * kPackedWidth);
        if (begin + t > position) {
          score = Vector{} + float(begin + t) > at ? never : score;
          store(own + t * kPackedWidth, score);
        }
        greatest = greatest > score ? greatest : score;
      }
      keep[lane] = exp(before - greatest);
      Vector sum = load(total + lane * kLanes) * keep[lane];
      for (int t = 0; t < keys; t++) {
        const Vector weight = exp(load(own + t * kPackedWidth) - greatest);
        store(own + t * kPackedWidth, weight);
        sum += weight;
      }
      store(top + lane * kLanes, greatest);
      store(total + lane * kLanes, sum);
    }
    for (int h = 0; h < size && begin > 0; h++)
      for (int lane = 0; lane < kVectors; lane++) {
        float* own = sums + h * kPackedWidth + lane * kLanes;
        store(own, load(own) * keep[lane]);
      }
    const auto [weights, steps] = packed_weights(scores, begin, keys, room);
    for (int j = 0; j < number_tiles.count; j++) {
      const int h = number_tiles.first(j), numbers = number_tiles.rows(j);
      const X* values = v + packed_size<X>(chunk.keys(), h) + size_t(begin / kWide) * kWide * numbers;
      multiply_tile_of(numbers, values, weights, steps, sums + h * kPackedWidth, kPackedWidth, true,
                       reinterpret_cast<const char*>(weights), 0);
    }
  }
  for (int lane = 0; lane < count; lane++) {
    const float scale = 1 / total[lane];
    for (int h = 0; h < size; h++) out[lane * step + h] = sums[h * kPackedWidth + lane] * scale;
    if (lse) lse[size_t(lane) * heads] = top[lane] + std::log(total[lane]);
  }
}

// q and out `[tokens, heads, size]`, lse `[tokens, heads]` or null. `pack(c, n, keys, values)` packs those of chunk c and
// head n, and they are multiplied as X.
template <class X>
void attend_chunks(Team& team, const std::vector<Chunk>& chunks, const float* q, int heads, int size, float* out,
                   float* lse, const std::function<void(int, int, X*, X*)>& pack) {
  struct Queries {
    int chunk, first, count;  // first: of the chunk's tokens
  };
  const int count = chunks.size();
  const size_t step = size_t(heads) * size;
  std::vector<size_t> keys_before{0};  // with what completes pairs
  std::vector<Queries> queries;
  double pairs = 0;
  for (int c = 0; c < count; c++) {
    keys_before.push_back(keys_before.back() + packed_size<X>(chunks[c].keys(), 1));
    for (int t = 0; t < chunks[c].tokens; t += kPackedWidth) {
      queries.push_back({c, t, std::min(kPackedWidth, chunks[c].tokens - t)});
      pairs += double(chunks[c].prefix + t + kPackedWidth) * kPackedWidth;
    }
  }
  const size_t all_keys = keys_before.back();
  thread_local Scratch scratch;
  X *keys = reinterpret_cast<X*>(scratch.of(2 * all_keys * step)), *values = keys + all_keys * step;
  const auto packed = [&](int c, int n) { return (n * all_keys + keys_before[c]) * size; };
  team.run(count * heads, 2.0 * all_keys * step, [&](int i) {
    const int c = i / heads, n = i % heads;
    pack(c, n, keys + packed(c, n), values + packed(c, n));
  });
  team.run(queries.size() * heads, 2 * pairs * step, [&](int i) {
    const Queries& own = queries[queries.size() - 1 - i / heads];  // the longest of a request first
    const Chunk& chunk = chunks[own.chunk];
    const int n = i % heads, token = chunk.begin + own.first;
    const size_t at = packed(own.chunk, n), from = token * step + size_t(n) * size;
    attend_queries(chunk, q + from, keys + at, values + at, own.first, own.count, size, step, heads, out + from,
                   lse ? lse + size_t(token) * heads + n : nullptr);
  });
}

}  // namespace apt
