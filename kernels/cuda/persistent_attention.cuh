// Attention of persistent.cu: one token of each row, over parts of the row's keys, and their merge.

// Of a head, thread l of LANES has EACH / 2 numbers from l · EACH / 2 on, and as many from 64 on.
struct Numbers { float of[EACH]; };

__device__ __forceinline__ float low_of(u32 word) { return of_bf16(word & 0xffff); }
__device__ __forceinline__ float high_of(u32 word) { return __uint_as_float(word & 0xffff0000); }

// Words of a head: EACH / 4 pairs.
__device__ __forceinline__ const u64* head_at(const u64* words, int l, int i) {
  return words + l * (EACH / 4) + i % (EACH / 8) * 2 + i / (EACH / 8) * 32;
}

__device__ __forceinline__ Numbers numbers_of(const Pair* words) {
  Numbers r;
#pragma unroll
  for (int i = 0; i < EACH / 4; i++) {
    r.of[i * 4] = low_of(words[i].a), r.of[i * 4 + 1] = high_of(words[i].a);
    r.of[i * 4 + 2] = low_of(words[i].b), r.of[i * 4 + 3] = high_of(words[i].b);
  }
  return r;
}

// The same of a head in bf16.
struct Packed { u32 of[EACH / 2]; };

__device__ __forceinline__ Packed load_packed(const void* head, int l) {
  Packed r;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const u8* const at = static_cast<const u8*>(head) + h * HEAD + l * EACH;
    if (EACH == 16) {
      const Four v = load_four(at);
#pragma unroll
      for (int i = 0; i < EACH / 4; i++) r.of[h * (EACH / 4) + i] = word_of(v, i);
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      r.of[h * (EACH / 4)] = v.x, r.of[h * (EACH / 4) + 1] = v.y;
    }
  }
  return r;
}

__device__ __forceinline__ Numbers numbers_of(const Packed& v) {
  Numbers r;
#pragma unroll
  for (int i = 0; i < EACH / 2; i++) r.of[2 * i] = low_of(v.of[i]), r.of[2 * i + 1] = high_of(v.of[i]);
  return r;
}

__device__ __forceinline__ int place_of(int l, int i) {  // of number i of thread l in the head
  return (i < EACH / 2 ? 0 : HEAD / 2 - EACH / 2) + l * (EACH / 2) + i;
}

struct Rotation { float cos[EACH / 2], sin[EACH / 2]; };

__device__ __forceinline__ void norm_and_rotate(Numbers& v, const Packed& norm, const Rotation& by,
                                                bool is_normed, float eps) {
  if (is_normed) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) square += v.of[i] * v.of[i];
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
    const float factor = rsqrtf(square / HEAD + eps);
    const Numbers weight = numbers_of(norm);
#pragma unroll
    for (int i = 0; i < EACH; i++) v.of[i] = rounded(rounded(v.of[i] * factor) * weight.of[i]);
  }
#pragma unroll
  for (int i = 0; i < EACH / 2; i++) {
    const float x = v.of[i], y = v.of[EACH / 2 + i];
    v.of[i] = rounded(x * by.cos[i] - y * by.sin[i]);
    v.of[EACH / 2 + i] = rounded(y * by.cos[i] + x * by.sin[i]);
  }
}

// Sums over the keys that a group of LANES threads has seen.
struct State { float most, sum, acc[EACH]; };

__device__ __forceinline__ void see(State (&s)[GROUP], const Numbers (&q)[GROUP], const Numbers& k,
                                    const Numbers& v, bool is_real) {
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float score = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) score += q[i].of[j] * k.of[j];
#pragma unroll
    for (int j = LANES / 2; j; j /= 2) score += __shfl_xor_sync(0xffffffff, score, j);
    if (!is_real) continue;
    const float most = fmaxf(s[i].most, score), before = exp2f(s[i].most - most);
    const float weight = exp2f(score - most);
    s[i].most = most, s[i].sum = s[i].sum * before + weight;
#pragma unroll
    for (int j = 0; j < EACH; j++) s[i].acc[j] = s[i].acc[j] * before + weight * v.of[j];
  }
}

__device__ __forceinline__ void store_head(u16* to, const Numbers& v, int l) {
#pragma unroll
  for (int i = 0; i < EACH; i += 2)
    *reinterpret_cast<u32*>(to + place_of(l, i)) = to_bf16(v.of[i]) | to_bf16(v.of[i + 1]) << 16;
}

// Sums over the groups of a warp. A thread keeps the sums of EACH / (32 / LANES) numbers, whose first
// is returned: at each step it gives half of its numbers away.
__device__ __forceinline__ int sum_of_groups(float (&v)[EACH], int lane) {
  int first = 0, num = EACH;
#pragma unroll
  for (int bit = LANES; bit < 32; bit *= 2) {
    const bool is_upper = lane & bit;
    num /= 2;
#pragma unroll
    for (int i = 0; i < EACH / 2; i++)
      if (i < num) {
        const float kept = is_upper ? v[num + i] : v[i], given = is_upper ? v[i] : v[num + i];
        v[i] = kept + __shfl_xor_sync(0xffffffff, given, bit);
      }
    first += is_upper ? num : 0;
  }
  return first;
}

// Joins the states of all groups of a program, and stores the result or, of several parts, a part.
__device__ __forceinline__ void join(Worker& w, State (&s)[GROUP], const Unit& u, u32 parts) {
  const int l = w.lane % LANES;
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float most = s[i].most;
#pragma unroll
    for (int j = LANES; j < 32; j *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, j));
    const float factor = exp2f(s[i].most - most);
    float sum = s[i].sum * factor;
#pragma unroll
    for (int j = LANES; j < 32; j *= 2) sum += __shfl_xor_sync(0xffffffff, sum, j);
#pragma unroll
    for (int j = 0; j < EACH; j++) s[i].acc[j] *= factor;
    const int kept = sum_of_groups(s[i].acc, w.lane);
    float* const state = w.scratch + (w.warp * GROUP + i) * (HEAD + 2);
#pragma unroll
    for (int j = 0; j < EACH * LANES / 32; j++) state[place_of(l, kept + j)] = s[i].acc[j];
    if (w.lane == 0) state[HEAD] = most, state[HEAD + 1] = sum;
  }
  meet();
  for (u32 i = threadIdx.x; i < GROUP * HEAD / 2; i += WORKERS) {
    const u32 head = i / (HEAD / 2), d = i % (HEAD / 2) * 2;
    const float* const first = w.scratch + head * (HEAD + 2);
    float most = NO_SCORE, sum = 0, low = 0, high = 0;
#pragma unroll
    for (int k = 0; k < WARPS; k++) most = fmaxf(most, first[k * GROUP * (HEAD + 2) + HEAD]);
#pragma unroll
    for (int k = 0; k < WARPS; k++) {
      const float* const state = first + k * GROUP * (HEAD + 2);
      const float factor = exp2f(state[HEAD] - most);
      sum += factor * state[HEAD + 1], low += factor * state[d], high += factor * state[d + 1];
    }
    low /= sum, high /= sum;
    const u32 tag = w.base + w.task->out_phase, q_head = u.row * HEADS + u.head * GROUP + head;
    if (parts == 1) {
      store_word(w.a.words + w.task->out_at + (q_head * HEAD + d) / 2, to_bf16(low) | to_bf16(high) << 16,
                 tag);
    } else {
      u64* const to = w.a.words + w.task->add_at + (u64)(q_head * SPLITS + u.part) * PART_WORDS;
      const u32 part_tag = w.base + w.task->add_phase;
      store_words(to + d, __float_as_uint(low), __float_as_uint(high), part_tag);
      if (d == 0) store_words(to + HEAD, __float_as_uint(most + log2f(sum)), 0, part_tag);
    }
  }
}

// Attention of one token of each row. Its words: in_at queries, keys and values of the step, out_at
// the result of rows of one part, add_at parts.
__device__ __forceinline__ void attend_unit(Worker& w, const Unit& u) {
  const Task& t = *w.task;
  const int l = w.lane % LANES;
  const u64* const words = w.a.words + t.in_at + u.row * (QKV / 2);
  const u64* const k_at = words + (HEADS + u.head) * (HEAD / 2);
  // a warp makes a query, and another the step's own key and value
  const bool has_query = w.warp < GROUP, has_new = u.is_last && w.warp == GROUP;
  if (has_query || has_new) {
    const u16* const norm_at = has_query ? t.q_norm : t.k_norm;
    const float* const cos_sin = w.a.cos_sin + w.a.rope_pos[u.row] * HEAD + l * (EACH / 2);
    // loaded before results are waited for
    const u32 slot = has_new ? (u32)w.a.slot[u.row] : 0;
    Packed norm = {};
    if (norm_at) norm = load_packed(norm_at, l);
    Rotation by;
#pragma unroll
    for (int i = 0; i < EACH / 2; i++) by.cos[i] = cos_sin[i], by.sin[i] = cos_sin[HEAD / 2 + i];
    const u64* const first = has_query ? words + (u.head * GROUP + w.warp) * (HEAD / 2) : k_at;
    constexpr int PAIRS = EACH / 4;
    Pair found[2 * PAIRS];  // of the query, or of the key and the value
    fetch(w, found, t.in_phase, [&](int i) -> const u64* {
      if (i < PAIRS) return head_at(first, l, i);
      return has_new ? head_at(k_at + KV_HEADS * (HEAD / 2), l, i - PAIRS) : nullptr;
    });
    __syncwarp();
    Numbers made = numbers_of(found);
    norm_and_rotate(made, norm, by, norm_at, w.a.eps);
    if (has_new) {
      const Numbers value = numbers_of(found + PAIRS);
      const u64 at = slot / w.a.block_size * w.a.block_stride +
                     slot % w.a.block_size * w.a.slot_stride + u.head * w.a.head_stride;
      if (w.lane < LANES) {
        store_head(w.own, made, l), store_head(w.own + HEAD, value, l);
        store_head(reinterpret_cast<u16*>(const_cast<u8*>(t.first_input)) + at, made, l);
        store_head(reinterpret_cast<u16*>(const_cast<u8*>(t.second_input)) + at, value, l);
      }
    } else if (w.lane < LANES) {
#pragma unroll
      for (int i = 0; i < EACH; i += 4)
        *reinterpret_cast<float4*>(w.queries + w.warp * HEAD + place_of(l, i)) =
            make_float4(made.of[i] * w.a.scale, made.of[i + 1] * w.a.scale, made.of[i + 2] * w.a.scale,
                        made.of[i + 3] * w.a.scale);
    }
  }
  meet();
  note(w, 1);
  Numbers q[GROUP];
  State s[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
#pragma unroll
    for (int j = 0; j < EACH; j += 4) {
      const float4 v = *reinterpret_cast<const float4*>(w.queries + i * HEAD + place_of(l, j));
      q[i].of[j] = v.x, q[i].of[j + 1] = v.y, q[i].of[j + 2] = v.z, q[i].of[j + 3] = v.w;
    }
    s[i].most = NO_SCORE, s[i].sum = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) s[i].acc[j] = 0;
  }
  // stages of earlier keys, and at last the step's own
  for (u32 token = u.from; token < u.to + u.is_last; token += TOKENS) {
    const bool is_own = token >= u.to;
    const u32 num = is_own ? 1 : u.to - token < TOKENS ? u.to - token : TOKENS;
    if (!is_own) wait_for(w.full + 8 * w.stage.at, w.stage.parity);
    const u8* const keys = is_own ? reinterpret_cast<const u8*>(w.own) : w.ring + w.stage.at * STAGE_BYTES;
    const u32 to_value = (is_own ? 1 : TOKENS) * HEAD * 2;
    for (u32 first = 0; first < num; first += GROUPS) {
      const u32 i = first + threadIdx.x / LANES;
      const bool is_real = i < num;
      const u8* const key = keys + (is_real ? i : 0) * (HEAD * 2);
      see(s, q, numbers_of(load_packed(key, l)), numbers_of(load_packed(key + to_value, l)), is_real);
    }
    if (is_own) break;
    __syncwarp();
    if (w.lane == 0) arrive(w.empty + 8 * w.stage.at);
    w.stage.advance(STAGES);
    // the last stage may be full of keys, or not
    if (u.is_last && token + TOKENS > u.to) token = u.to - TOKENS;
  }
  meet();  // the scratch memory may still be read
  join(w, s, u, num_parts(w.seq_len[u.row]));
}

__device__ __forceinline__ void attend(Worker& w) {
  for (u32 unit = w.task->first; unit < w.task->first + w.task->count; unit++) {
    const Unit u = unit_of(unit, w.seq_len);
    if (u.is_real) attend_unit(w, u);
  }
}

// Merges parts. A unit is so many pairs of numbers of all rows' heads that each thread has a part of
// one: a thread that waits for much notices it late.
__device__ __forceinline__ void merge(Worker& w) {
  const Task& t = *w.task;
  const u32 part = threadIdx.x % SPLITS;
  for (u32 unit = t.first; unit < t.first + t.count; unit++) {
    const u32 pair = unit * (WORKERS / SPLITS) + threadIdx.x / SPLITS, head = pair / (HEAD / 2);
    const u32 parts = head < ROWS * HEADS ? num_parts(w.seq_len[head / HEADS]) : 1;
    const bool is_real = parts > 1 && part < parts;  // the result of one part is there already
    const u64* const from = w.a.words + t.in_at + (head * SPLITS + part) * PART_WORDS;
    Pair v[2] = {};  // the numbers, and the log of the sums
    fetch(w, v, t.in_phase, [&](int i) -> const u64* {
      return is_real ? from + (i ? HEAD : pair % (HEAD / 2) * 2) : nullptr;
    });
    __syncwarp();
    note(w, 1);
    const float lse = is_real ? __uint_as_float(v[1].a) : NO_SCORE;
    float most = lse;
#pragma unroll
    for (int i = 1; i < SPLITS; i *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, i));
    float sum = exp2f(lse - most), low = sum * __uint_as_float(v[0].a), high = sum * __uint_as_float(v[0].b);
#pragma unroll
    for (int i = 1; i < SPLITS; i *= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, i);
      low += __shfl_xor_sync(0xffffffff, low, i), high += __shfl_xor_sync(0xffffffff, high, i);
    }
    if (is_real && part == 0)
      store_word(w.a.words + t.out_at + pair, to_bf16(low / sum) | to_bf16(high / sum) << 16,
                 w.base + t.out_phase);
  }
}
