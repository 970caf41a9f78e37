// Attention over the paged cache: by tiles of queries, and for single tokens by parts of their keys.
// Needs vectors.h, threads.h, tiles.h and panels.h.
//
// H head size, M query lanes (a lane: one head of a query token).

namespace {

// the score of an unseen key: finite, so that the difference of two is not NaN
constexpr float kNever = -1e30f;
constexpr int kTileLanes = 48;  // query lanes per tile: 3 vectors of 16, 6 of 8, 12 of 4
constexpr int kTileKeys = 64;   // keys per step: K and V in fp32 at H = 128 take 64 KiB of the L2

struct Attention {
  char* out;                   // [T, N, H], contiguous
  const char* q;               // [T, N, H]
  const char* k_cache;         // [C, B, K, H]
  const char* v_cache;         // [C, B, K, H]
  const int32_t* block_table;  // [R, P]
  const int32_t* seq_len;      // [R]
  const int32_t* q_start;      // [R + 1]
  const float* sinks;          // [N]: scores without a value, or null
  const int32_t* ends;         // [T]: where the keys that a query sees end, or null: after itself
  int64_t q_stride_T, q_stride_N;
  int64_t k_stride_C, k_stride_B, k_stride_K;
  int64_t v_stride_C, v_stride_B, v_stride_K;
  int64_t table_stride_R;
  int64_t num_tokens, num_rows, num_heads, num_kv_heads, head_dim, block_size;
  int64_t max_q_len, window;
  int64_t q_dtype, kv_dtype;
  int64_t ordered;  // sums of a query are the same in any step: see attend_tile
  int64_t num_threads;
  double scale;
};

// What the sink of a head adds to the sum of exp2(score - max) over its keys.
INLINE float of_sink(const Attention& at, int64_t head, float max) {
  return at.sinks ? std::exp2(at.sinks[head] * 1.4426950408889634f - max) : 0.0f;
}

template <Start kStart>
void multiply_lanes(float* c, const float* a, int64_t a_stride_row, int64_t a_stride_depth,
                    const float* b, int64_t num_rows, int64_t depth, int64_t num_lanes,
                    const float* factors) {
  for (int64_t at = 0; at < num_lanes; at += kPanel)
    multiply_panel<kStart>(c + at, kTileLanes, a, a_stride_row, a_stride_depth, b + at, kTileLanes,
                           num_rows, depth, num_lanes - at, factors + at);
}

template <typename T>
INLINE void copy_to_float(float* out, const T* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

// A tile of queries: tokens first_token .. first_token + num_tokens - 1 of one row (first_pos is
// the position of the first) times heads first_head .. first_head + num_heads - 1 of one kv head.
struct Tile {
  int64_t row, first_token, num_tokens, first_pos, kv_head, first_head, num_heads;
};

// A query adds its keys in steps of kTileKeys. With `ordered` the steps begin at multiples of
// kTileKeys, so its sums do not depend on the other queries of the tile.
template <typename KV>
void attend_tile(const Attention& at, const Tile& tile) {
  const int64_t H = at.head_dim, B = at.block_size;
  const int64_t num_lanes = tile.num_tokens * tile.num_heads;
  const int64_t num_vecs = (num_lanes + kLanes - 1) / kLanes;
  float* q_HM = scratch(
      (size_t)(2 * H * kTileLanes + kTileKeys * kTileLanes + 2 * kTileKeys * H + 5 * kTileLanes));
  float* out_HM = q_HM + H * kTileLanes;
  float* score_LM = out_HM + H * kTileLanes;
  float* k_LH = score_LM + kTileKeys * kTileLanes;
  float* v_LH = k_LH + kTileKeys * H;
  float* max_M = v_LH + kTileKeys * H;
  float* sum_M = max_M + kTileLanes;
  float* alpha_M = sum_M + kTileLanes;
  int32_t* pos_M = (int32_t*)(alpha_M + kTileLanes);
  int32_t* last_M = pos_M + kTileLanes;  // the last key that a query sees

  // Queries are transposed so that lanes run along vectors: scores, maxima and sums then need no
  // sum across a vector.
  const float q_scale = (float)(at.scale * 1.4426950408889634);  // log2(e), for exp2
  std::memset(q_HM, 0, sizeof(float) * H * kTileLanes);
  std::memset(out_HM, 0, sizeof(float) * H * kTileLanes);
  with_dtype(at.q_dtype, [&](auto zero) {
    typedef decltype(zero) Q;
    for (int64_t m = 0; m < num_lanes; ++m) {
      int64_t token = tile.first_token + m / tile.num_heads,
              head = tile.first_head + m % tile.num_heads;
      const Q* q_H = (const Q*)at.q + token * at.q_stride_T + head * at.q_stride_N;
      for (int64_t h = 0; h < H; ++h) q_HM[h * kTileLanes + m] = to_float(q_H[h]) * q_scale;
    }
  });
  for (int64_t m = 0; m < kTileLanes; ++m) {
    max_M[m] = kNever;
    sum_M[m] = 0;
    pos_M[m] = m < num_lanes ? (int32_t)(tile.first_pos + m / tile.num_heads) : -1;
    last_M[m] = pos_M[m];
    if (at.ends && m < num_lanes) {
      const int32_t end = at.ends[tile.first_token + m / tile.num_heads];
      last_M[m] = std::min(std::max(end - 1, pos_M[m]), at.seq_len[tile.row] - 1);
    }
  }

  const int32_t window =
      (int32_t)std::min<int64_t>(at.window > 0 ? at.window : INT32_MAX, INT32_MAX);
  const int64_t last_pos = tile.first_pos + tile.num_tokens - 1;
  const int64_t first_key = std::max<int64_t>(0, tile.first_pos - window + 1),
                end_key = *std::max_element(last_M, last_M + num_lanes) + 1;
  const int32_t* blocks = at.block_table + tile.row * at.table_stride_R;
  const int64_t begin_key = at.ordered ? first_key / kTileKeys * kTileKeys : first_key;
  for (int64_t key = begin_key; key < end_key; key += kTileKeys) {
    const int64_t num_keys = std::min<int64_t>(kTileKeys, end_key - key);
    const int64_t num_unseen = std::max<int64_t>(0, first_key - key);  // they may hold NaN
    std::fill_n(k_LH, num_unseen * H, 0.0f);
    std::fill_n(v_LH, num_unseen * H, 0.0f);
    for (int64_t l = num_unseen; l < num_keys; ++l) {
      int64_t block = blocks[(key + l) / B], offset = (key + l) % B;
      copy_to_float(k_LH + l * H,
                    (const KV*)at.k_cache + block * at.k_stride_C + offset * at.k_stride_B +
                        tile.kv_head * at.k_stride_K,
                    H);
      copy_to_float(v_LH + l * H,
                    (const KV*)at.v_cache + block * at.v_stride_C + offset * at.v_stride_B +
                        tile.kv_head * at.v_stride_K,
                    H);
    }
    multiply_lanes<Start::kZero>(score_LM, k_LH, H, 1, q_HM, num_keys, H, num_lanes, alpha_M);

    const bool all_seen =
        key + num_keys - 1 <= tile.first_pos && key > last_pos - window && num_lanes % kLanes == 0;
    for (int64_t vec = 0; vec < num_vecs; ++vec) {
      float* score_L = score_LM + vec * kLanes;
      IVec pos = *(const IVecAt*)(pos_M + vec * kLanes);
      IVec last = *(const IVecAt*)(last_M + vec * kLanes);
      Vec old_max = load(max_M + vec * kLanes), new_max = old_max;
      if (!all_seen) {
        for (int64_t l = 0; l < num_keys; ++l) {
          IVec key_pos = IVec{} + (int32_t)(key + l);
          IVec seen = (key_pos <= last) & (pos - key_pos < window);
          Vec score = load(score_L + l * kTileLanes);
          store(score_L + l * kTileLanes, seen ? score : splat(kNever));
        }
      }
      for (int64_t l = 0; l < num_keys; ++l)
        new_max = vmax(new_max, load(score_L + l * kTileLanes));
      Vec alpha = exp2(old_max - new_max), total{};
      for (int64_t l = 0; l < num_keys; ++l) {
        Vec score = load(score_L + l * kTileLanes);
        Vec p = exp2(score - new_max);
        // the maximum of a lane that has seen no key yet is kNever
        if (!all_seen) p = score <= kNever ? Vec{} : p;
        total += p;
        store(score_L + l * kTileLanes, p);
      }
      store(max_M + vec * kLanes, new_max);
      store(sum_M + vec * kLanes, multiply_add(load(sum_M + vec * kLanes), alpha, total));
      store(alpha_M + vec * kLanes, alpha);
    }
    multiply_lanes<Start::kScale>(out_HM, v_LH, 1, H, score_LM, H, num_keys, num_lanes, alpha_M);
  }

  with_dtype(at.q_dtype, [&](auto zero) {
    typedef decltype(zero) Q;
    for (int64_t m = 0; m < num_lanes; ++m) {
      int64_t token = tile.first_token + m / tile.num_heads,
              head = tile.first_head + m % tile.num_heads;
      Q* out_H = (Q*)at.out + (token * at.num_heads + head) * H;
      const float total = sum_M[m] + of_sink(at, head, max_M[m]);
      float factor = sum_M[m] > 0 ? 1.0f / total : 0.0f;  // no key seen: zeros
      for (int64_t h = 0; h < H; ++h) put(out_H + h, out_HM[h * kTileLanes + m] * factor);
    }
  });
}

// Decode: one token of one row, all its heads, and a part of its keys. It is limited by memory.
// Every key and value is read once for the query heads that share it, in the order of memory: all
// kv heads of a key are adjacent, so a few keys at a time are a few streams that the hardware
// prefetches. Values are prefetched while keys are read, and keys while values are read. kSpanKeys,
// the keys of a part, is fixed: results depend on neither the batch nor the threads.
constexpr int kSpanKeys = 128;
constexpr int kStepKeys = 16;  // keys per step
constexpr int kStreams = 4;    // keys, or values, read at the same time

struct Span {
  int64_t row, token, first_key, end_key;
  int64_t part, first_part, num_parts;  // the parts of a row are adjacent in the workspace
};

// score[g][l] = q[g] . k[l] for NK keys
template <typename KV, int GB, int NK>
INLINE void score_keys(float* score, const float* q_GH, const KV* const* keys, int64_t at,
                       int64_t H) {
  Vec acc[GB][NK] = {};
  for (int64_t h = 0; h < H; h += kLanes) {
    Vec k[NK];
    for (int l = 0; l < NK; ++l) k[l] = load(keys[l] + at + h);
    for (int g = 0; g < GB; ++g) {
      Vec q = load(q_GH + g * H + h);
      for (int l = 0; l < NK; ++l) acc[g][l] = multiply_add(q, k[l], acc[g][l]);
    }
  }
  for (int g = 0; g < GB; ++g)
    for (int l = 0; l < NK; ++l) score[g * kStepKeys + l] = sum(acc[g][l]);
}

// out[g] = alpha[g] * out[g] + sum over l of p[g][l] * v[l] for NK values; no alpha means 1
template <typename KV, int GB, int NK>
INLINE void add_values(float* out_GH, const float* p, const float* alpha, const KV* const* values,
                       int64_t at, int64_t H) {
  for (int64_t h = 0; h < H; h += kLanes) {
    Vec acc[GB];
    for (int g = 0; g < GB; ++g)
      acc[g] = alpha ? load(out_GH + g * H + h) * alpha[g] : load(out_GH + g * H + h);
    for (int l = 0; l < NK; ++l) {
      Vec v = load(values[l] + at + h);
      for (int g = 0; g < GB; ++g) acc[g] = multiply_add(splat(p[g * kStepKeys + l]), v, acc[g]);
    }
    for (int g = 0; g < GB; ++g) store(out_GH + g * H + h, acc[g]);
  }
}

// Calls f(i, width) over 0 .. num - 1 with widths Max, Max / 2, ..., 1. The width is a type.
template <int Max, typename F>
INLINE void for_some(int64_t num, F&& f) {
  int64_t i = 0;
  for (; i + Max <= num; i += Max) f(i, std::integral_constant<int, Max>{});
  if constexpr (Max > 1)
    for_some<Max / 2>(num - i, [&](int64_t rest, auto width) { f(i + rest, width); });
}

// partial: [out N x H | max N | sum N] for each part; parts_left: unfinished parts of each row
template <typename KV>
void attend_span(const Attention& at, const Span& span, float* partial,
                 std::atomic<int32_t>* parts_left) {
  const int64_t H = at.head_dim, B = at.block_size, N = at.num_heads, G = N / at.num_kv_heads;
  const int64_t part_size = N * (H + 2);
  float* q_NH = scratch((size_t)(N * (H + kStepKeys + 1)));
  float* score_NL = q_NH + N * H;
  float* alpha_N = score_NL + N * kStepKeys;
  float* out_NH = partial + span.part * part_size;
  float* max_N = out_NH + N * H;
  float* sum_N = max_N + N;
  const float q_scale = (float)(at.scale * 1.4426950408889634);  // log2(e), for exp2
  with_dtype(at.q_dtype, [&](auto zero) {
    typedef decltype(zero) Q;
    for (int64_t n = 0; n < N; ++n) {
      const Q* q_H = (const Q*)at.q + span.token * at.q_stride_T + n * at.q_stride_N;
      for (int64_t h = 0; h < H; h += kLanes) store(q_NH + n * H + h, load(q_H + h) * q_scale);
    }
  });
  std::memset(out_NH, 0, sizeof(float) * N * H);
  for (int64_t n = 0; n < N; ++n) {
    max_N[n] = kNever;
    sum_N[n] = 0;
  }

  struct Step {
    const KV *keys[kStepKeys], *values[kStepKeys];  // those of kv head 0
    int num_keys;
  };
  const int32_t* blocks = at.block_table + span.row * at.table_stride_R;
  const auto locate = [&](Step& step, int64_t key) {
    step.num_keys = (int)std::max<int64_t>(0, std::min<int64_t>(kStepKeys, span.end_key - key));
    int64_t block_idx = key / B, offset = key % B;
    for (int l = 0; l < step.num_keys; ++l) {
      const int64_t block = blocks[block_idx];
      step.keys[l] = (const KV*)at.k_cache + block * at.k_stride_C + offset * at.k_stride_B;
      step.values[l] = (const KV*)at.v_cache + block * at.v_stride_C + offset * at.v_stride_B;
      if (++offset == B) offset = 0, ++block_idx;
    }
  };
  const auto request = [&](const KV* const* rows, int64_t head_at, int num) {
    for (int l = 0; l < num; ++l)
      for (int64_t h = 0; h < H; h += 64 / (int64_t)sizeof(KV))
        __builtin_prefetch(rows[l] + head_at + h);
  };
  Step steps[2];
  locate(steps[0], span.first_key);
  for (int64_t key = span.first_key; key < span.end_key; key += kStepKeys) {
    const Step& step = steps[(key - span.first_key) / kStepKeys % 2];
    Step& next = steps[(key - span.first_key) / kStepKeys % 2 ^ 1];
    const int num_keys = step.num_keys;
    locate(next, key + kStepKeys);
    for_some<kStreams>(num_keys, [&](int64_t l, auto width) {
      for (int64_t kv_head = 0; kv_head < at.num_kv_heads; ++kv_head) {
        request(step.values + l, kv_head * at.v_stride_K, width);
        for_some<2>(G, [&](int64_t g, auto heads) {
          const int64_t n = kv_head * G + g;
          score_keys<KV, heads, width>(score_NL + n * kStepKeys + l, q_NH + n * H, step.keys + l,
                                       kv_head * at.k_stride_K, H);
        });
      }
    });
    for (int64_t n = 0; n < N; ++n) {
      float* score_L = score_NL + n * kStepKeys;
      for (int l = num_keys; l < kStepKeys; ++l) score_L[l] = kNever;
      Vec top = load(score_L), total{};
      for (int l = kLanes; l < kStepKeys; l += kLanes) top = vmax(top, load(score_L + l));
      const float new_max = std::max(max_N[n], max_of(top));
      for (int l = 0; l < kStepKeys; l += kLanes) {
        Vec score = load(score_L + l), p = exp2(score - new_max);
        p = score <= kNever ? Vec{} : p;
        total += p;
        store(score_L + l, p);
      }
      alpha_N[n] = exp2(splat(max_N[n] - new_max))[0];
      sum_N[n] = sum_N[n] * alpha_N[n] + sum(total);
      max_N[n] = new_max;
    }
    for_some<kStreams>(num_keys, [&](int64_t l, auto width) {
      for (int64_t kv_head = 0; kv_head < at.num_kv_heads; ++kv_head) {
        request(next.keys + l, kv_head * at.k_stride_K,
                (int)std::min<int64_t>(width, next.num_keys - l));
        for_some<4>(G, [&](int64_t g, auto heads) {
          const int64_t n = kv_head * G + g;
          add_values<KV, heads, width>(out_NH + n * H, score_NL + n * kStepKeys + l,
                                       l ? nullptr : alpha_N + n, step.values + l,
                                       kv_head * at.v_stride_K, H);
        });
      }
    });
  }

  // the last thread to finish a part of a row adds its parts, in order
  if (parts_left[span.first_part].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const float* parts = partial + span.first_part * part_size;
  with_dtype(at.q_dtype, [&](auto zero) {
    typedef decltype(zero) Q;
    for (int64_t n = 0; n < N; ++n) {
      Q* out_H = (Q*)at.out + (span.token * N + n) * H;
      float top = kNever, total = 0;
      for (int64_t i = 0; i < span.num_parts; ++i)
        top = std::max(top, parts[i * part_size + N * H + n]);
      float* joined_H = q_NH;  // the queries are no longer needed
      std::memset(joined_H, 0, sizeof(float) * H);
      for (int64_t i = 0; i < span.num_parts; ++i) {
        const float* part = parts + i * part_size;
        const float factor = exp2(splat(part[N * H + n] - top))[0];
        total += part[N * H + N + n] * factor;
        for (int64_t h = 0; h < H; h += kLanes)
          store(joined_H + h, load(joined_H + h) + load(part + n * H + h) * factor);
      }
      const float factor = total > 0 ? 1.0f / (total + of_sink(at, n, top)) : 0.0f;
      for (int64_t h = 0; h < H; ++h) put(out_H + h, joined_H[h] * factor);
    }
  });
}

}  // namespace

extern "C" void nanovllm_paged_attention(const Attention* args) {
  const Attention& at = *args;
  const int64_t group = at.num_heads / at.num_kv_heads;
  const int64_t tile_heads = std::min<int64_t>(group, kTileLanes),
                tile_tokens = kTileLanes / tile_heads;
  const size_t token_bytes = (size_t)(at.num_heads * at.head_dim * (at.q_dtype == kFp32 ? 4 : 2));
  const auto zero_tokens = [&](int64_t first, int64_t end) {
    if (end > first) std::memset(at.out + first * token_bytes, 0, (end - first) * token_bytes);
  };

  std::vector<Tile> tiles;
  std::vector<Span> spans;
  int64_t written = 0;  // the outputs of tokens below this are written
  for (int64_t row = 0; row < at.num_rows; ++row) {
    int64_t first = at.max_q_len == 1 ? row : at.q_start[row],
            end = at.max_q_len == 1 ? row + 1 : at.q_start[row + 1];
    int64_t seq_len = at.seq_len[row];
    if (end <= first || seq_len <= 0) continue;
    zero_tokens(written, first);
    written = end;
    if (end - first == 1 && at.head_dim % kLanes == 0 && !at.ordered) {
      const int64_t first_key = at.window > 0 ? std::max<int64_t>(0, seq_len - at.window) : 0;
      const int64_t num_parts = (seq_len - 1) / kSpanKeys - first_key / kSpanKeys + 1;
      const int64_t first_part = (int64_t)spans.size();
      for (int64_t i = 0; i < num_parts; ++i) {
        const int64_t from = (first_key / kSpanKeys + i) * kSpanKeys;
        spans.push_back({row, first, std::max(from, first_key), std::min(from + kSpanKeys, seq_len),
                         first_part + i, first_part, num_parts});
      }
      continue;
    }
    for (int64_t token = first; token < end; token += tile_tokens)
      for (int64_t kv_head = 0; kv_head < at.num_kv_heads; ++kv_head)
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head += tile_heads)
          tiles.push_back({row, token, std::min(tile_tokens, end - token), seq_len - (end - token),
                           kv_head, head, std::min(tile_heads, (kv_head + 1) * group - head)});
  }
  zero_tokens(written, at.num_tokens);

  const int64_t num_tiles = (int64_t)tiles.size(), num_spans = (int64_t)spans.size();
  std::vector<std::atomic<int32_t>> parts_left(num_spans);
  for (const Span& span : spans)
    parts_left[span.first_part].store((int32_t)span.num_parts, std::memory_order_relaxed);
  std::unique_ptr<float[]> partial(new float[num_spans * at.num_heads * (at.head_dim + 2)]);
  parallel_for(num_tiles + num_spans, at.num_threads, [&](int64_t item) {
    // the last tiles of a row see the most keys, so they start first
    with_dtype(at.kv_dtype, [&](auto zero) {
      typedef decltype(zero) KV;
      if (item < num_tiles) attend_tile<KV>(at, tiles[num_tiles - 1 - item]);
      else attend_span<KV>(at, spans[item - num_tiles], partial.get(), parts_left.data());
    });
  });
}
