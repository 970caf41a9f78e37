// CPU kernels, compiled at first use by library.py.
//
// Each exported function takes a pointer to a struct of arguments. library.py declares the fields
// of these structs, too, and has the compiler check that both agree (see build.py).
//
// Shapes are those of reference/. H head size, M query lanes (a lane: one head of a query token).

#include "vectors.h"
#include "threads.h"
#include "tiles.h"

namespace {

// ---------------------------------------------------------------------------------------- products

// C[RB, NV vectors] = start + A[RB, depth] B[depth, NV vectors]; start is 0 or factors * C
// (one factor per column)
enum class Start { kZero, kScale };

template <int RB, int NV, Start kStart>
INLINE void multiply_tile(float* c, int64_t c_stride, const float* a, int64_t a_stride_row,
                          int64_t a_stride_depth, const float* b, int64_t b_stride, int64_t depth,
                          const float* factors) {
  Vec acc[RB][NV];
  for (int r = 0; r < RB; ++r)
    for (int n = 0; n < NV; ++n) {
      acc[r][n] = kStart == Start::kZero ? Vec{} : load(c + r * c_stride + n * kLanes);
      if (kStart == Start::kScale) acc[r][n] *= load(factors + n * kLanes);
    }
  for (int64_t d = 0; d < depth; ++d) {
    Vec b_vec[NV];
    for (int n = 0; n < NV; ++n) b_vec[n] = load(b + d * b_stride + n * kLanes);
    for (int r = 0; r < RB; ++r) {
      Vec a_vec = splat(a[r * a_stride_row + d * a_stride_depth]);
      for (int n = 0; n < NV; ++n) acc[r][n] = multiply_add(a_vec, b_vec[n], acc[r][n]);
    }
  }
  for (int r = 0; r < RB; ++r)
    for (int n = 0; n < NV; ++n) store(c + r * c_stride + n * kLanes, acc[r][n]);
}

// the same for any number of rows; columns are a multiple of a vector, at most kPanel
constexpr int kPanel = 3 * kLanes;

template <Start kStart, int NV>
void multiply_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride_row,
                   int64_t a_stride_depth, const float* b, int64_t b_stride, int64_t num_rows,
                   int64_t depth, const float* factors) {
  int64_t row = 0;
  for (; row + kTileRows <= num_rows; row += kTileRows)
    multiply_tile<kTileRows, NV, kStart>(c + row * c_stride, c_stride, a + row * a_stride_row,
                                         a_stride_row, a_stride_depth, b, b_stride, depth, factors);
  for (; row < num_rows; ++row)
    multiply_tile<1, NV, kStart>(c + row * c_stride, c_stride, a + row * a_stride_row, a_stride_row,
                                 a_stride_depth, b, b_stride, depth, factors);
}

template <Start kStart>
void multiply_panel(float* c, int64_t c_stride, const float* a, int64_t a_stride_row,
                    int64_t a_stride_depth, const float* b, int64_t b_stride, int64_t num_rows,
                    int64_t depth, int64_t num_columns, const float* factors) {
  const int64_t num_vecs = (num_columns + kLanes - 1) / kLanes;
  auto rows = num_vecs >= 3   ? multiply_rows<kStart, 3>
              : num_vecs == 2 ? multiply_rows<kStart, 2>
                              : multiply_rows<kStart, 1>;
  rows(c, c_stride, a, a_stride_row, a_stride_depth, b, b_stride, num_rows, depth, factors);
}

// --------------------------------------------------------------------------------------- attention

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

// ------------------------------------------------------------------------------------------ linear
namespace {

struct Linear {
  char* out;           // [T, O], contiguous
  const char* x;       // [T, D]
  const char* weight;  // [O, D]
  const char* bias;    // [O] or null
  const float* scale;  // [O]: factors of the outputs of int8 weights, or null
  int64_t num_tokens, num_outputs, depth;
  int64_t x_stride, weight_stride;
  int64_t dtype;
  int64_t ordered;  // a row's sums are the same among any number of rows
  int64_t num_threads;
};

INLINE Vec load(const int8_t* p) {
#if LANES == 16
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int8_t BytesAt __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector((Bytes) * (const BytesAt*)p, IVec), Vec);
}

// int8, widened in registers: integers are multiplied by x, and the sums are scaled at the end
template <typename T>
struct Int8Step {
  typedef int8_t Weight;
  typedef float X;
  typedef T Io;
  static constexpr bool kPairs = false;
  static constexpr int kDepth = kLanes;
  static constexpr int kPassTokens = 8;
  struct Value {
    Vec v;
  };
  static INLINE Value load_weight(const int8_t* p) { return {load(p)}; }
  static INLINE Vec fma(Vec acc, const float* x, Value w) {
    return multiply_add(load(x), w.v, acc);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// bf16 represents every int8 exactly, and its product takes two elements at once
template <>
struct Int8Step<Bf16> {
  typedef int8_t Weight;
  typedef Bf16 X;
  typedef Bf16 Io;
  static constexpr bool kPairs = false;
  static constexpr int kDepth = 32;
  static constexpr int kPassTokens = 8;
  typedef Bf16Step::Value Value;
  static INLINE Value load_weight(const int8_t* p) {
    return {_mm512_cvtne2ps_pbh((__m512)load(p + kLanes), (__m512)load(p))};
  }
  static INLINE Vec fma(Vec acc, const Bf16* x, Value w) { return Bf16Step::fma(acc, x, w); }
};
#endif

template <typename Step>
void linear(const Linear& at) {
  typedef typename Step::X X;
  typedef typename Step::Io Io;
  typedef typename Step::Weight Weight;
  const int64_t x_stride = row_stride<Step>(at.depth);
  X* x = (X*)scratch<kShared>((size_t)at.num_tokens * x_stride * sizeof(X) / 4);
  for (int64_t t = 0; t < at.num_tokens; ++t)
    copy_row<Step>(x + t * x_stride, (const Io*)at.x + t * at.x_stride, at.depth);
  const Product<Step> weights{x, x_stride, (const Weight*)at.weight, at.weight_stride, at.depth};
  const auto finish = [&](const float* sums, int64_t token, int num_tokens, int64_t o, int num) {
    Io* out = (Io*)at.out + token * at.num_outputs + o;
    for (int i = 0; i < num; ++i) {
      const float bias = at.bias ? to_float(((const Io*)at.bias)[o + i]) : 0.0f;
      const float scale = std::is_same_v<Weight, int8_t> ? at.scale[o + i] : 1.0f;
      for (int t = 0; t < num_tokens; ++t)
        put(out + t * at.num_outputs + i, sums[t * num + i] * scale + bias);
    }
  };
  const int64_t chunk = chunk_outputs(at.depth * (int64_t)sizeof(Weight));
  parallel_for((at.num_outputs + chunk - 1) / chunk, at.num_threads, [&](int64_t item) {
    const int64_t first = item * chunk, end = std::min(first + chunk, at.num_outputs);
    for_passes<Step>(at.num_tokens, [&](int64_t token, int64_t num_tokens) {
      product(weights, token, num_tokens, first, end, finish);
    });
  });
}

// fp32 with more tokens: limited by arithmetic. Tokens run along vectors and weights are broadcast
// from memory, so that only x is rearranged: out^T[O, T] = weight[O, D] x^T[D, T]. int8 weights are
// widened one block at a time. With fewer tokens than kPanelTokens linear_rows is faster.
constexpr int64_t kPanelTokens = kLanes == 16 ? 11 : 17;
constexpr int64_t kPanelTokensInt8 = kLanes == 16 ? 25 : 33;
constexpr int64_t kBlockTokens = 10 * kPanel;  // tokens that a thread multiplies by its weights
constexpr int64_t kBlockDepth = 192;           // a panel of x^T of this depth stays in the L1
constexpr int64_t kMaxBlockOutputs = 64;
constexpr int64_t kPackDepth = 64;

// out[RB, NV vectors] = weight[RB, depth] x[depth, NV vectors], added to out if `add`. A sum takes
// every kPhases-th element of the depth, so that few rows still have as many sums as products are
// in flight.
template <int RB, int NV, int kPhases>
INLINE void multiply_weight_tile(float* out, int64_t out_stride, const float* weight,
                                 int64_t weight_stride, const float* x, int64_t x_stride,
                                 int64_t depth, bool add) {
  constexpr int kLine = 16;
  Vec acc[RB][NV][kPhases] = {};
  const auto multiply = [&](int64_t d, int phase) __attribute__((always_inline)) {
    Vec x_vec[NV];
    for (int n = 0; n < NV; ++n) x_vec[n] = load(x + d * x_stride + n * kLanes);
    for (int r = 0; r < RB; ++r) {
      const Vec w = splat(weight[r * weight_stride + d]);
      for (int n = 0; n < NV; ++n) acc[r][n][phase] += w * x_vec[n];
    }
  };
  int64_t d = 0;
  for (; d + kLine <= depth; d += kLine) {
    // the next rows
    for (int r = 0; r < RB; ++r) __builtin_prefetch(weight + (RB + r) * weight_stride + d, 0, 2);
    for (int i = 0; i < kLine; i += kPhases)
      for (int phase = 0; phase < kPhases; ++phase) multiply(d + i + phase, phase);
  }
  for (; d < depth; ++d) multiply(d, 0);
  for (int r = 0; r < RB; ++r)
    for (int n = 0; n < NV; ++n) {
      float* to = out + r * out_stride + n * kLanes;
      Vec sum = acc[r][n][0];
      for (int phase = 1; phase < kPhases; ++phase) sum += acc[r][n][phase];
      store(to, add ? load(to) + sum : sum);
    }
}

// With one vector of tokens, 4 rows with two sums each are faster than 8 rows: rows are often 4 KiB
// apart, and a set of the L1 holds 8 such lines (Zen 4). With two vectors 8 rows are faster.
template <int NV, int RB = NV == 1 ? 4 : kTileRows, int kPhases = NV == 1 ? 2 : 1>
void multiply_weights(float* out, int64_t out_stride, const float* weight, int64_t weight_stride,
                      const float* x, int64_t x_stride, int64_t num_rows, int64_t depth, bool add) {
  int64_t row = 0;
  for (; row + RB <= num_rows; row += RB)
    multiply_weight_tile<RB, NV, kPhases>(out + row * out_stride, out_stride,
                                          weight + row * weight_stride, weight_stride, x, x_stride,
                                          depth, add);
  for (; row < num_rows; ++row)
    multiply_weight_tile<1, NV, kPhases>(out + row * out_stride, out_stride,
                                         weight + row * weight_stride, weight_stride, x, x_stride,
                                         depth, add);
}

template <typename T>
INLINE void widen(T* out, const int8_t* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) put(out + i, (float)in[i]);
}

template <typename Weight>
void linear_by_panels(const Linear& at) {
  constexpr bool kWidened = std::is_same_v<Weight, int8_t>;
  const int64_t D = at.depth, O = at.num_outputs;
  const Weight* weight = (const Weight*)at.weight;
  const float* bias = (const float*)at.bias;
  int64_t block_outputs = kMaxBlockOutputs;  // fewer if threads would be idle
  while (block_outputs > 16 && O / block_outputs < 4 * at.num_threads) block_outputs /= 2;
  const int64_t num_blocks = (O + block_outputs - 1) / block_outputs;
  for (int64_t first_token = 0; first_token < at.num_tokens; first_token += kBlockTokens) {
    const int64_t T = std::min(kBlockTokens, at.num_tokens - first_token);
    const float* x = (const float*)at.x + first_token * at.x_stride;
    const int64_t num_vecs = (T + kLanes - 1) / kLanes, num_panels = (num_vecs + 2) / 3;
    const int64_t panel_tokens = (num_vecs + num_panels - 1) / num_panels *
                                 kLanes;  // equal panels: 4 vectors are 2 + 2, not 3 + 1
    const int64_t num_packs = (D + kPackDepth - 1) / kPackDepth;
    const int64_t sums_stride = num_panels * panel_tokens;
    float* packed = scratch<kShared>((size_t)(num_panels * panel_tokens * D));  // [panel, D, token]
    parallel_for(num_panels * num_packs, at.num_threads, [&](int64_t item) {
      const int64_t panel = item / num_packs, d_first = item % num_packs * kPackDepth,
                    d_end = std::min(d_first + kPackDepth, D);
      float* to = packed + panel * panel_tokens * D;
      for (int64_t m = 0; m < panel_tokens; ++m) {
        const int64_t token = panel * panel_tokens + m;
        for (int64_t d = d_first; d < d_end; ++d)
          to[d * panel_tokens + m] = token < T ? x[token * at.x_stride + d] : 0.0f;
      }
    });
    parallel_for(num_blocks, at.num_threads, [&](int64_t item) {
      const int64_t first = item * block_outputs, num_rows = std::min(block_outputs, O - first);
      float* sums =
          scratch((size_t)(block_outputs * (kBlockTokens + kBlockDepth)));  // [O, T] of the block
      float* widened = sums + block_outputs * kBlockTokens;
      // with one panel, whole rows of weights are read, which the hardware prefetches well
      const int64_t block_depth = num_panels == 1 && !kWidened ? D : kBlockDepth;
      for (int64_t d = 0; d < D; d += block_depth) {
        const int64_t depth = std::min(block_depth, D - d);
        const float* block;
        int64_t block_stride;
        if constexpr (kWidened) {
          for (int64_t row = 0; row < num_rows; ++row)
            widen(widened + row * kBlockDepth, weight + (first + row) * at.weight_stride + d,
                  depth);
          block = widened, block_stride = kBlockDepth;
        } else {
          block = weight + first * at.weight_stride + d, block_stride = at.weight_stride;
        }
        for (int64_t token = 0; token < T; token += panel_tokens) {
          const int64_t panel_vecs = (std::min(panel_tokens, T - token) + kLanes - 1) / kLanes;
          const auto multiply = panel_vecs == 3   ? multiply_weights<3>
                                : panel_vecs == 2 ? multiply_weights<2>
                                                  : multiply_weights<1>;
          multiply(sums + token, sums_stride, block, block_stride,
                   packed + token * D + d * panel_tokens, panel_tokens, num_rows, depth, d > 0);
        }
      }
      for (int64_t token = 0; token < T; ++token) {
        float* out = (float*)at.out + (first_token + token) * O + first;
        for (int64_t o = 0; o < num_rows; ++o)
          out[o] = sums[o * sums_stride + token] * (kWidened ? at.scale[first + o] : 1.0f) +
                   (bias ? bias[first + o] : 0.0f);
      }
    });
  }
}

}  // namespace

// A kernel call that was recorded (recording.py). `answers`: the kernel returns 0 if it refuses.
struct Recorded {
  const void* kernel;
  const char* arguments;
  int64_t answers;
};

// Runs the calls in order. Returns 0, or the number of the one that refuses, counted from 1.
extern "C" int64_t nanovllm_replay(const Recorded* calls, int64_t num) {
  for (int64_t i = 0; i < num; ++i) {
    const Recorded& at = calls[i];
    if (!at.answers) ((void (*)(const char*))at.kernel)(at.arguments);
    else if (!((int64_t (*)(const char*))at.kernel)(at.arguments)) return i + 1;
  }
  return 0;
}

// The most tokens for which `linear` is faster than F.linear, as measured. In fp32 with vectors of
// 16 panels are twice as fast for any number, except on Intel's machines with matrix units (AMX),
// where F.linear reaches 0.9 of the peak from 128 tokens on. In bf16 these use F.linear's library.
extern "C" int64_t nanovllm_small_m_linear_max_tokens(int64_t dtype) {
#if LANES == 16 && defined(__AMX_BF16__)
  if (dtype == kFp32) return 96;
#elif LANES == 16
  if (dtype == kFp32) return INT64_MAX;
#endif
#if LANES == 16 && !defined(__AMX_BF16__)
  if (dtype == kBf16) return 32;
#endif
  return dtype == kFp16 ? 0 : 16;
}

extern "C" void nanovllm_small_m_linear(const Linear* args) {
  const bool by_panels = args->num_tokens >= kPanelTokens && !args->ordered;
  if (args->dtype == kFp32 && by_panels) linear_by_panels<float>(*args);
  else if (args->dtype == kFp32) linear<Fp32Step>(*args);
  else linear<Bf16Step>(*args);
}

// int8 weights; `dtype` is that of x, bias and out, fp32 or bf16
extern "C" void nanovllm_linear_int8(const Linear* args) {
  const bool by_panels = args->num_tokens >= kPanelTokensInt8 && !args->ordered;
  if (args->dtype == kFp32 && by_panels) linear_by_panels<int8_t>(*args);
  else if (args->dtype == kFp32) linear<Int8Step<float>>(*args);
  else linear<Int8Step<Bf16>>(*args);
}

struct Widen {
  char* out;         // [O, D] bf16, contiguous
  const int8_t* in;  // [O, D]
  int64_t num_rows, size, in_stride;
  int64_t num_threads;
};

extern "C" void nanovllm_widen_int8(const Widen* args) {
  const Widen& at = *args;
  parallel_for(at.num_rows, at.num_rows * at.size < kMinParallel ? 1 : at.num_threads,
               [&](int64_t row) {
                 widen((Bf16*)at.out + row * at.size, at.in + row * at.in_stride, at.size);
               });
}

// -------------------------------------------------------------------------------------------- rows

// These kernels round where reference/ rounds.
namespace {

template <typename T>
INLINE float inverse_rms(const T* x, int64_t n, double eps) {
  Vec squares{};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec v = load_first(x + i, n - i);
    squares = multiply_add(v, v, squares);
  }
  return 1.0f / std::sqrt(sum(squares) / (float)n + (float)eps);
}

template <typename T>
INLINE Vec scaled(Vec x, float factor, const T* weight, int64_t n) {
  return rounded_to<T>(rounded_to<T>(x * factor) * load_first(weight, n));
}

struct RmsNorm {
  char *out, *residual_out;           // [T, D]; residual_out only with a residual
  const char *x, *residual, *weight;  // [T, D], [T, D] or null, [D]
  int64_t num_tokens, size;
  int64_t dtype, num_threads;
  double eps;
};

struct SiluMul {
  char* out;            // [T, F]
  const char* gate_up;  // [T, 2F]
  int64_t num_tokens, size;
  int64_t dtype, num_threads;
};

struct QkNormRopeStore {
  char* q_out;                  // [T, N, H]
  const char* qkv;              // [T, (N + 2K) H]
  const char *q_norm, *k_norm;  // [H] or null
  const float* cos_sin;         // [M, H]
  const char *pos, *slot;       // [T]
  char *k_cache, *v_cache;      // [C, B, K, H]
  int64_t qkv_stride, cos_sin_stride;
  int64_t k_stride_C, k_stride_B, k_stride_K;
  int64_t v_stride_C, v_stride_B, v_stride_K;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, block_size;
  int64_t pos_bytes, slot_bytes;
  int64_t dtype, num_threads;
  double eps;
};

INLINE int64_t index_at(const char* p, int64_t bytes, int64_t i) {
  return bytes == 8 ? ((const int64_t*)p)[i] : ((const int32_t*)p)[i];
}

// out = rope(norm(x)), which rotates the halves x1 and x2 of a head
template <typename T>
void norm_rope(T* out, const T* x, const T* weight, const float* cos_sin, int64_t H, double eps) {
  const int64_t half = H / 2;
  const float factor = weight ? inverse_rms(x, H, eps) : 1.0f;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    Vec x1 = load_first(x + i, n), x2 = load_first(x + half + i, n);
    if (weight)
      x1 = scaled(x1, factor, weight + i, n), x2 = scaled(x2, factor, weight + half + i, n);
    const Vec cos = load_first(cos_sin + i, n), sin = load_first(cos_sin + half + i, n);
    store_first(out + i, x1 * cos - x2 * sin, n);
    store_first(out + half + i, x2 * cos + x1 * sin, n);
  }
}

template <typename T>
void qk_norm_rope_store_token(const QkNormRopeStore& at, int64_t token) {
  const int64_t H = at.head_dim, N = at.num_heads, K = at.num_kv_heads;
  const T* qkv = (const T*)at.qkv + token * at.qkv_stride;
  const float* cos_sin = at.cos_sin + index_at(at.pos, at.pos_bytes, token) * at.cos_sin_stride;
  for (int64_t n = 0; n < N; ++n)
    norm_rope((T*)at.q_out + (token * N + n) * H, qkv + n * H, (const T*)at.q_norm, cos_sin, H,
              at.eps);
  const int64_t slot = index_at(at.slot, at.slot_bytes, token), block = slot / at.block_size,
                offset = slot % at.block_size;
  T* k_out = (T*)at.k_cache + block * at.k_stride_C + offset * at.k_stride_B;
  T* v_out = (T*)at.v_cache + block * at.v_stride_C + offset * at.v_stride_B;
  for (int64_t k = 0; k < K; ++k) {
    norm_rope(k_out + k * at.k_stride_K, qkv + (N + k) * H, (const T*)at.k_norm, cos_sin, H,
              at.eps);
    const T* v = qkv + (N + K + k) * H;
    for (int64_t i = 0; i < H; i += kLanes)
      store_first(v_out + k * at.v_stride_K + i, load_first(v + i, H - i), H - i);
  }
}

}  // namespace

extern "C" void nanovllm_rms_norm(const RmsNorm* args) {
  const RmsNorm& at = *args;
  const int64_t D = at.size;
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(
        at.num_tokens, at.num_tokens * D < kMinParallel ? 1 : at.num_threads, [&](int64_t token) {
          const T *x = (const T*)at.x + token * D, *weight = (const T*)at.weight;
          T* out = (T*)at.out + token * D;
          if (at.residual) {
            const T* residual = (const T*)at.residual + token * D;
            T* sum = (T*)at.residual_out + token * D;
            for (int64_t d = 0; d < D; d += kLanes)
              store_first(sum + d, load_first(x + d, D - d) + load_first(residual + d, D - d),
                          D - d);
            x = sum;
          }
          const float factor = inverse_rms(x, D, at.eps);
          for (int64_t d = 0; d < D; d += kLanes)
            store_first(out + d, scaled(load_first(x + d, D - d), factor, weight + d, D - d),
                        D - d);
        });
  });
}

extern "C" void nanovllm_silu_mul(const SiluMul* args) {
  const SiluMul& at = *args;
  const int64_t F = at.size;
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(at.num_tokens, at.num_tokens * F < kMinParallel ? 1 : at.num_threads,
                 [&](int64_t token) {
                   const T *gate = (const T*)at.gate_up + token * 2 * F, *up = gate + F;
                   T* out = (T*)at.out + token * F;
                   for (int64_t f = 0; f < F; f += kLanes) {
                     const Vec g = load_first(gate + f, F - f), u = load_first(up + f, F - f);
                     store_first(out + f, silu<T>(g) * u, F - f);
                   }
                 });
  });
}

extern "C" void nanovllm_qk_norm_rope_store(const QkNormRopeStore* args) {
  const QkNormRopeStore& at = *args;
  const int64_t size = at.num_tokens * (at.num_heads + 2 * at.num_kv_heads) * at.head_dim;
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(at.num_tokens, size < kMinParallel ? 1 : at.num_threads,
                 [&](int64_t token) { qk_norm_rope_store_token<T>(at, token); });
  });
}

// ------------------------------------------------------------------------------------------- masks

namespace {

struct TokenBitmask {
  void* out;
  const void* logits;
  const int32_t* allowed;
  const int64_t* row;
  int64_t num_rows, vocab_size, row_stride, num_words, dtype, num_threads;
};

// Most rows of a batch allow every token and most words of a mask forbid all or allow all, so words
// and not tokens are the unit of work.
template <typename T>
void keep_row(T* out, const T* logits, const int32_t* allowed, int64_t vocab_size, T minus_inf) {
  for (int64_t first = 0; first < vocab_size; first += 32) {
    const uint32_t word = (uint32_t)allowed[first / 32];
    const int64_t num = std::min<int64_t>(32, vocab_size - first);
    if (word == 0xFFFFFFFFu) {
      std::memcpy(out + first, logits + first, num * sizeof(T));
    } else if (word == 0) {
      std::fill_n(out + first, num, minus_inf);
    } else {
      for (int64_t bit = 0; bit < num; ++bit)
        out[first + bit] = word >> bit & 1 ? logits[first + bit] : minus_inf;
    }
  }
}

}  // namespace

extern "C" void nanovllm_apply_token_bitmask(const TokenBitmask* args) {
  const TokenBitmask& at = *args;
  const int64_t V = at.vocab_size;
  parallel_for(at.num_rows, at.num_rows * V < kMinParallel ? 1 : at.num_threads, [&](int64_t r) {
    const int32_t* allowed = at.allowed + at.row[r] * at.num_words;
    if (at.dtype == 0) {
      keep_row<float>((float*)at.out + r * V, (const float*)at.logits + r * at.row_stride, allowed,
                      V, -INFINITY);
    } else {  // bit patterns of -inf in bf16 and in fp16
      keep_row<uint16_t>((uint16_t*)at.out + r * V, (const uint16_t*)at.logits + r * at.row_stride,
                         allowed, V, at.dtype == 1 ? 0xFF80 : 0xFC00);
    }
  });
}

// ------------------------------------------------------------------------------------------ sample

// The hash of reference/ in 32-bit arithmetic, which wraps where the reference masks bits.
namespace {

template <typename U>
INLINE U keyed_hash32(U x, uint32_t key) {
  x = ((x ^ (x >> 16)) * 0x21F0AAADu) ^ key;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

INLINE uint32_t hash32(uint32_t x) { return keyed_hash32(x, 0); }

struct Sample {
  const void* logits;
  const float* temperature;
  const int64_t *seed, *pos;
  int64_t* token;
  float* best;              // written unless it is null
  const int64_t* token_of;  // [V]: the tokens of the columns, ascending; null: from first_token on
  int64_t num_rows, vocab_size, row_stride, first_token, dtype, num_threads;

  int64_t token_at(int64_t column) const {
    return token_of ? token_of[column] : first_token + column;
  }
};

struct Best {
  float score = -INFINITY;
  int64_t token = -1;  // NO_TOKEN of reference/: no score above -inf, as in a row of NaN
};

// The smallest of equally likely tokens wins, so chunks are searched and merged in ascending order
// with >.
template <typename T>
Best best_of(const Sample& at, int64_t row, int64_t begin, int64_t end, uint32_t key,
             uint32_t second) {
  Best best;
  const T* logits = (const T*)at.logits + row * at.row_stride;
  const float temperature = at.temperature[row];
  const bool greedy = temperature == 0.0f;
  for (int64_t v = begin; v < end; v += kLanes) {
    alignas(64) float score[kLanes];
    alignas(64) uint32_t bits[kLanes];
    Vec scaled = load_first(logits + v, end - v);
    IVec possible;
    if (greedy) {
      possible = scaled > best.score;
    } else {
      scaled = scaled / temperature;
      UVec token;
      if (at.token_of)
        for (int lane = 0; lane < kLanes; ++lane)
          token[lane] = (uint32_t)at.token_of[std::min(v + lane, end - 1)];
      else
        for (int lane = 0; lane < kLanes; ++lane)
          token[lane] = (uint32_t)(at.first_token + v + lane);
      UVec mantissa = keyed_hash32(token ^ key, second) >> 9;
      // Noise above d needs 1 - u < exp(-d) <= 2^-floor(d / ln 2). This integer test avoids nearly
      // all logarithms.
      Vec doublings = (splat(best.score) - scaled) * 1.442695f;
      doublings = doublings > 0.0f ? doublings : splat(0.0f);
      doublings = doublings < 23.0f ? doublings : splat(23.0f);
      UVec room = (UVec{} + (1u << 23)) >> __builtin_convertvector(doublings, UVec);
      possible = (IVec)((0x7FFFFFu - mantissa) <= room);
      std::memcpy(bits, &mantissa, sizeof bits);
    }
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= possible[lane] != 0;
    if (!any) continue;
    std::memcpy(score, &scaled, sizeof score);
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, end - v); ++lane) {
      float noisy = score[lane];
      if (!greedy) noisy -= std::log(-std::log(((float)bits[lane] + 0.5f) * 0x1p-23f));
      if (noisy > best.score) best = {noisy, at.token_at(v + lane)};
    }
  }
  return best;
}

}  // namespace

extern "C" void nanovllm_sample(const Sample* args) {
  const Sample& at = *args;
  constexpr int64_t kChunk = 8192;
  // a rank without tokens has one empty chunk
  const int64_t num_chunks = std::max<int64_t>(1, (at.vocab_size + kChunk - 1) / kChunk),
                num_tasks = at.num_rows * num_chunks;
  std::vector<Best> best(num_tasks);
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(num_tasks, at.num_rows * at.vocab_size < kMinParallel ? 1 : at.num_threads,
                 [&](int64_t task) {
                   const int64_t row = task / num_chunks, begin = task % num_chunks * kChunk;
                   const uint64_t seed = (uint64_t)at.seed[row];
                   const uint32_t low = hash32((uint32_t)seed),
                                  high = hash32((uint32_t)(seed >> 32));
                   const uint32_t key = hash32(low ^ hash32(high ^ hash32((uint32_t)at.pos[row])));
                   best[task] = best_of<T>(at, row, begin, std::min(begin + kChunk, at.vocab_size),
                                           key, hash32(key ^ 0x5BD1E995u));
                 });
  });
  for (int64_t row = 0; row < at.num_rows; ++row) {
    Best winner = best[row * num_chunks];
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk)
      if (best[row * num_chunks + chunk].score > winner.score)
        winner = best[row * num_chunks + chunk];
    at.token[row] = winner.token;
    if (at.best) at.best[row] = winner.score;
  }
}
