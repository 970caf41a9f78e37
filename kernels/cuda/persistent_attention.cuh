// Attention of persistent.cu: the token of each row, over parts of the row's keys, and their merge.
//
// A stage has up to TOKENS keys and their values. First their scores with each query are made
// (persistent_scores.cuh); then each warp sums values for its part of the results, by lanes of 8
// numbers, which take turns with the keys.

#define QUERIES (GROUP == 3 ? 4 : GROUP > 4 ? 8 : GROUP)
#define LANES (2 * QUERIES)                   // of 8 numbers: a warp's part of the results
#define KEYS_AT_ONCE (32 / LANES)
#define MAKING 16                             // threads that make a query
#define KEPT (LANES == 16 ? 4 : 2)            // of a query's numbers, that a thread stores

using Made = Numbers<MAKING>;

__device__ __forceinline__ Made numbers_of(const Pair* words) {
  Made r;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    r.of[i * 4] = low_of(words[i].a), r.of[i * 4 + 1] = high_of(words[i].a);
    r.of[i * 4 + 2] = low_of(words[i].b), r.of[i * 4 + 3] = high_of(words[i].b);
  }
  return r;
}

struct Rotation { float cos[Made::EACH / 2], sin[Made::EACH / 2]; };

__device__ __forceinline__ void norm_and_rotate(Made& v, const Made& weight, const Rotation& by,
                                                bool is_normed, float eps) {
  if (is_normed) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < Made::EACH; i++) square += v.of[i] * v.of[i];
#pragma unroll
    for (int i = MAKING / 2; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
    const float factor = rsqrtf(square / HEAD + eps);
#pragma unroll
    for (int i = 0; i < Made::EACH; i++) v.of[i] = rounded(rounded(v.of[i] * factor) * weight.of[i]);
  }
#pragma unroll
  for (int i = 0; i < Made::EACH / 2; i++) {
    const float x = v.of[i], y = v.of[Made::EACH / 2 + i];
    v.of[i] = rounded(x * by.cos[i] - y * by.sin[i]);
    v.of[Made::EACH / 2 + i] = rounded(y * by.cos[i] + x * by.sin[i]);
  }
}

__device__ __forceinline__ void store_head(u16* to, const Made& v, int l) {
#pragma unroll
  for (int i = 0; i < Made::EACH; i += 4)
    *reinterpret_cast<uint2*>(to + Made::place(l, i)) =
        make_uint2(to_bf16_pair(v.of[i], v.of[i + 1]), to_bf16_pair(v.of[i + 2], v.of[i + 3]));
}

// Half a warp makes a query, or a key of the step and its value: normed, rotated, in shared memory, and
// those of the row's own token in their cache. `idx` counts the queries, then the keys, from the row's own
// one back. The second half of a warp does what the first does, but for that which makes the key beside
// eight queries.
__device__ __forceinline__ void make_head(Worker& w, const Unit& u, u32 idx) {
  const Task& t = *w.task;
  const bool is_query = idx < GROUP, is_new = !is_query && u.is_last;
  const u32 own = SEVERAL && is_new ? idx - GROUP : 0, row = u.row - own;
  const int l = w.lane % MAKING;
  const u64* const words = w.a.words + t.in_at + row * (QKV / 2);
  const u64* const k_at = words + (HEADS + u.head) * (HEAD / 2);
  const u16* const norm_at = is_query ? t.q_norm : t.k_norm;
  const float* const cos_sin = w.a.cos_sin + w.a.rope_pos[row] * HEAD + l * (Made::EACH / 2);
  // loaded before results are waited for
  const u32 slot = is_new ? (u32)w.a.slot[row] : 0;
  Made norm = {};
  if (norm_at) norm = load_numbers<MAKING>(norm_at, l);
  Rotation by;
#pragma unroll
  for (int i = 0; i < Made::EACH / 2; i++) by.cos[i] = cos_sin[i], by.sin[i] = cos_sin[HEAD / 2 + i];
  const u64* const first = is_query ? words + (u.head * GROUP + idx) * (HEAD / 2) : k_at;
  Pair found[4];  // of the query, or of the key and the value
  const u64* const second = k_at + KV_HEADS * (HEAD / 2);
  fetch(
      w, found, t.in_phase, [&](int i) { return i < 2 || is_new; },
      [&](int i) { return (i < 2 ? first : second) + i % 2 * 32 + l * 2; });
  __syncwarp();
  note(w, ARRIVED);
  Made made = numbers_of(found);
  norm_and_rotate(made, norm, by, norm_at, w.a.eps);
  if (w.lane >= MAKING && GROUP < WARPS) return;
  if (is_query) {
    if (w.lane >= MAKING) return;
    const float scale = IS_SCALED ? w.a.scale : 1.0f;
#pragma unroll
    for (int i = 0; i < Made::EACH; i += 4)
      *reinterpret_cast<float4*>(shared<float>(AT_QUERIES) + idx * HEAD + Made::place(l, i)) =
          make_float4(made.of[i] * scale, made.of[i + 1] * scale, made.of[i + 2] * scale,
                      made.of[i + 3] * scale);
    return;
  }
  if (!is_new) return;
  const Made value = numbers_of(found + 2);
  u16* const to = shared<u16>(AT_OWN) + own * (2 * HEAD);
  store_head(to, made, l), store_head(to + HEAD, value, l);
  if (SEVERAL && own) return;
  const u64 at = slot / w.a.block_size * w.a.block_stride + slot % w.a.block_size * w.a.slot_stride +
                 u.head * w.a.head_stride;
  store_head(reinterpret_cast<u16*>(const_cast<u8*>(t.first_input)) + at, made, l);
  store_head(reinterpret_cast<u16*>(const_cast<u8*>(t.second_input)) + at, value, l);
}

// All queries of a unit, and the keys and values of the step that it has.
__device__ __forceinline__ void make_heads(Worker& w, const Unit& u) {
  if (GROUP == WARPS)
    make_head(w, u, w.warp == 0 && w.lane >= MAKING ? GROUP : w.warp);
  else if (w.warp < GROUP || (w.warp == GROUP && u.is_last && !SEVERAL))
    make_head(w, u, w.warp);
#if SEVERAL  // warps without a query take turns with the keys
  else if (u.is_last)
#pragma unroll 1
    for (u32 own = w.warp - GROUP; own < num_own(u.row); own += WARPS - GROUP) make_head(w, u, GROUP + own);
#endif
}

// The score of a key of the step with a query, by all threads of a warp.
__device__ __forceinline__ float own_score(const Worker& w, const float* query, u32 own) {
  const float4 q = *reinterpret_cast<const float4*>(query + w.lane * 4);
  const uint2 k = *reinterpret_cast<const uint2*>(shared<u16>(AT_OWN) + own * (2 * HEAD) + w.lane * 4);
  float score = q.x * low_of(k.x) + q.y * high_of(k.x) + q.z * low_of(k.y) + q.w * high_of(k.y);
#pragma unroll
  for (int i = 16; i; i /= 2) score += __shfl_xor_sync(0xffffffff, score, i);
  return IS_SCALED ? score : score * w.a.scale;
}

// Sums over the keys that a warp has met: of 8 numbers of a query's result. `sum` is a thread's part.
struct State { float most = NO_SCORE, sum = 0, acc[8] = {}; };

__device__ __forceinline__ void add_value(State& s, float weight, const u8* value) {
  const Four v = load_four(value);
#pragma unroll
  for (int j = 0; j < 4; j++)
    s.acc[2 * j] += weight * low_of(word_of(v, j)), s.acc[2 * j + 1] += weight * high_of(word_of(v, j));
}

// Adds a value of the step by its weight, before which `most` has grown.
__device__ __forceinline__ void add_own(State& s, const Worker& w, float weight, u32 own, u32 number) {
  if (w.lane >= LANES) return;
  add_value(s, weight, shared<u8>(AT_OWN) + (2 * own + 1) * (HEAD * 2) + number * 2);
  if (w.lane == 0) s.sum += weight;
}

// Adds the values of the request's tokens before the row's own one.
__device__ __forceinline__ void add_earlier(State& s, const Worker& w, const float* query, u32 num, u32 number) {
  for (u32 own = 1; own < num; own++) {
    const float score = own_score(w, query, own), most = fmaxf(s.most, score), before = exp2f(s.most - most);
    s.most = most, s.sum *= before;
#pragma unroll
    for (int j = 0; j < 8; j++) s.acc[j] *= before;
    add_own(s, w, exp2f(score - most), own, number);
  }
}

// Adds a stage's values by their scores, a lane's `score` and all lanes' `own` (NO_SCORE: none).
__device__ __forceinline__ void add_values(State& s, const Worker& w, const u8* values, u32 num, float score,
                                           float own, u32 number) {
  float most = score;
#pragma unroll
  for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, i));
  most = fmaxf(fmaxf(s.most, own), most);
  const float before = exp2f(s.most - most), weight = exp2f(score - most);
  s.most = most, s.sum = s.sum * before + weight;
#pragma unroll
  for (int j = 0; j < 8; j++) s.acc[j] *= before;
#pragma unroll
  for (u32 i = 0; i < TOKENS; i += KEYS_AT_ONCE) {
    const u32 key = i + w.lane / LANES;
    const float of_key = __shfl_sync(0xffffffff, weight, key);
    if (num) add_value(s, of_key, values + (key < num ? key : 0) * (HEAD * 2) + number * 2);
  }
  if (own != NO_SCORE) add_own(s, w, exp2f(own - most), 0, number);
}

// Sums over a warp's lanes of the same numbers. A thread keeps KEPT of them, whose first is returned;
// threads of the same ones have the same sums.
__device__ __forceinline__ u32 sum_of_lanes(State& s, int lane) {
  u32 first = 0, num = 8;
#pragma unroll
  for (int bit = LANES; bit < 32; bit *= 2) {
    if (num > 2) {
      const bool is_upper = lane & bit;
      num /= 2;
#pragma unroll
      for (u32 i = 0; i < 4; i++)
        if (i < num) {
          const float kept = is_upper ? s.acc[num + i] : s.acc[i];
          const float given = is_upper ? s.acc[i] : s.acc[num + i];
          s.acc[i] = kept + __shfl_xor_sync(0xffffffff, given, bit);
        }
      first += is_upper ? num : 0;
    } else {
#pragma unroll
      for (u32 i = 0; i < 2; i++) s.acc[i] += __shfl_xor_sync(0xffffffff, s.acc[i], bit);
    }
  }
#pragma unroll
  for (int i = 16; i; i /= 2) s.sum += __shfl_xor_sync(0xffffffff, s.sum, i);
  return first;
}

// The place of two numbers of a part of a head's result: those of 16 numbers follow each other, then
// those of the next part.
__device__ __forceinline__ u32 part_at(u32 q_head, u32 number, u32 part) {
  return ((q_head * (HEAD / 16) + number / 16) * SPLITS + part) * 16 + number % 16;
}

// Stores a thread's numbers of a query's result or, if the row has several parts, of a part.
__device__ __forceinline__ void store_part(const Worker& w, const State& s, const Unit& u, u32 q_head,
                                           u32 number, u32 parts) {
  const Task& t = *w.task;
  const float by = 1.0f / s.sum;
#pragma unroll
  for (int i = 0; i < KEPT; i += 2, number += 2) {
    const float low = s.acc[i] * by, high = s.acc[i + 1] * by;
    if (parts == 1) {
      const u32 at = (q_head * HEAD + number) / 2;
      store_word(w.a.words + t.out_at + at, to_bf16_pair(low, high), w.base + t.out_phase);
      continue;
    }
    const Wide word = {low, high, s.most + log2f(s.sum), w.base + t.add_phase};
    store_wide(w.a.words + t.add_at + part_at(q_head, number, u.part), word);
  }
}

// Attention of one token. Its words: in_at queries, keys and values of the step, out_at
// the result of rows of one part, add_at parts.
__device__ __forceinline__ void attend_unit(Worker& w, const Unit& u) {
  const u32 of_warp = w.warp * LANES / 16, number = (w.warp * LANES + w.lane % LANES) % 16 * 8;
  make_heads(w, u);
  meet();
  note(w, READY);
  const Queries q = load_queries(w);
  State s;
  const bool has_query = QUERIES == GROUP || of_warp < GROUP;
  const float* const query = shared<float>(AT_QUERIES) + of_warp * HEAD;
  float own = NO_SCORE;
  if (u.is_last && has_query) own = own_score(w, query, 0);
  u32 token = u.from, turn = 0;
  do {
    const u32 num = u.to - token < TOKENS ? u.to - token : TOKENS;
    const u8* const keys = shared<u8>(w.stage.at * STAGE_BYTES);
    float* const scores = shared<float>(AT_SCORES) + turn * (GROUP * TOKENS);
    if (num) wait_for(full_barrier(w.stage.at), w.stage.parity);
    score_keys(w, q, keys, num, scores);
    meet();
    const bool is_end = token + TOKENS >= u.to;
    if (has_query)
      add_values(s, w, keys + TOKENS * HEAD * 2, num, scores[of_warp * TOKENS + w.lane],
                 is_end ? own : NO_SCORE, number);
    __syncwarp();
    if (num) {
      if (ALL_ARRIVE || w.lane == 0) arrive(empty_barrier(w.stage.at));
      w.stage.advance(STAGES);
    }
    token += TOKENS, turn ^= 1;
  } while (token < u.to);
  if (SEVERAL && u.is_last && has_query) add_earlier(s, w, query, num_own(u.row), number);
  note(w, COMPUTED);
  if (!has_query) return;
  const u32 first = sum_of_lanes(s, w.lane);
  // of lanes with the same sums, the first stores them
  constexpr u32 SAME = GROUP == 1 ? 24 : QUERIES == 2 ? 16 : 0;
  if (!(w.lane & SAME))
    store_part(w, s, u, u.row * HEADS + u.head * GROUP + of_warp, number + first,
               num_parts(shared<int>(AT_LENS)[u.row]));
}

__device__ __forceinline__ void attend(Worker& w) {
  for (u32 unit = w.task->first; unit < w.task->first + w.task->count; unit++) {
    const Unit u = unit_of(unit);
    if (unit > w.task->first) meet();  // the query and the own key may still be read
    if (u.is_real) attend_unit(w, u);
  }
}

// Merges parts. A unit is a head of a row; a warp has 16 of its numbers, and a thread two of them, of
// every fourth part.
__device__ __forceinline__ void merge(Worker& w) {
  constexpr u32 EACH = (SPLITS + 3) / 4;
  const Task& t = *w.task;
  const u32 number = w.warp * 16 + w.lane % 8 * 2, first = w.lane / 8;
  for (u32 head = t.first; head < t.first + t.count; head++) {
    const u32 parts = num_parts(shared<int>(AT_LENS)[head / HEADS]);
    if (parts == 1) continue;  // the result is there already
    const u64* const from = w.a.words + t.in_at + part_at(head, number, first);
    Wide v[EACH];
    fetch(
        w, v, t.in_phase, [&](u32 i) { return first + 4 * i < parts; },
        [&](u32 i) { return from + 4 * 16 * i; });
    __syncwarp();
    note(w, ARRIVED);
    note(w, READY);
    float most = NO_SCORE, sum = 0, low = 0, high = 0;
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
      if (first + 4 * i < parts) most = fmaxf(most, v[i].c);
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
      if (first + 4 * i >= parts) continue;
      const float by = exp2f(v[i].c - most);
      sum += by, low += by * v[i].a, high += by * v[i].b;
    }
#pragma unroll
    for (int i = 8; i < 32; i *= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, i);
      low += __shfl_xor_sync(0xffffffff, low, i), high += __shfl_xor_sync(0xffffffff, high, i);
    }
    const float by = 1.0f / sum;
    if (w.lane < 8)
      store_word(w.a.words + t.out_at + (head * HEAD + number) / 2, to_bf16_pair(low * by, high * by),
                 w.base + t.out_phase);
  }
}
