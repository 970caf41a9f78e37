// A decode step of a dense model in bf16 as one kernel: a program on each multiprocessor goes through
// its list of tasks (persistent.py; docs/persistent.md).
//
// One warp copies: it goes through the tasks ahead of the others and fills a ring of STAGES with the
// weights and the keys and values of earlier tokens that they read. These are there before the step,
// so it waits for nothing but places in the ring, and memory is not idle while tasks wait for
// results. WARPS warps compute.
//
// Results go from task to task through words of 64 bits in global memory: 32 bits of data, two numbers
// in bf16 or one in fp32, and a tag. A word is stored and loaded as a whole, so a reader that finds the
// tag of the phase that it waits for has the data too: nothing is counted, cleared or fenced. A tag is
// the number of the step times the number of phases, plus the phase; each program counts the steps.
// A thread polls at most `max_polls` times in a step. Then it writes to `status` which task waited for
// what, and goes on without waiting, so that the kernel ends.
//
// Constants, by -D: ROWS, HIDDEN, HEADS, KV_HEADS, SPLITS (parts of a row's keys), NUM_TASKS (of a
// program), MAX_DEPTH (of products), STAGES, WARPS, CLOCKS (times of tasks are kept).
//
// t thread of four | g group of four threads: the weight row in a half of a tile, and the row of x

#include "device.cuh"

struct __align__(16) Task {
  const u8* first_input;   // PRODUCT weight [O, D], ATTEND keys [C, B, K, H]
  const u8* second_input;  // PRODUCT norm [D] or none, ATTEND values
  const u16* q_norm;       // ATTEND [H] or none
  const u16* k_norm;
  u32 kind, flags;
  u32 in_phase, add_phase, out_phase;
  u32 in_at, add_at, out_at;  // the first words
  u32 depth, num_outs;
  u32 first, count;           // tiles, or units
};

struct Args {
  const Task* tasks;      // [grid, NUM_TASKS]
  u64* words;
  const u16* h;           // [R, HIDDEN]
  u16* logits;            // [R, V]
  const float* cos_sin;   // [M, H]
  const long long* rope_pos;  // [R]
  const long long* slot;      // [R]
  const int* table;       // [R, P]
  const int* seq_len;     // [R]
  u32* steps;             // [grid], those that ended
  u32* status;            // [8]
  u64* clocks;            // [grid, NUM_TASKS, 3]
  u64 block_stride, slot_stride, head_stride;  // of keys and values, in numbers
  u32 table_stride, block_size, num_phases, max_polls;
  float eps, scale;       // scale: of scores, times log2(e)
};

#define END 0
#define EMBED 1
#define PRODUCT 2
#define ATTEND 3
#define MERGE 4
#define SILU 1     // a tile is 8 rows of the gate and 8 of the other half
#define HALF 2     // a tile is 8 rows
#define NORM 4
#define ADD 8      // adds a residual
#define LOGITS 16  // results go to `logits`

#define WORKERS (32 * WARPS)
#define GROUP (HEADS / KV_HEADS)
#define HEAD 128
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD)
#define WIDE 512                                // columns of a stage with 16 rows
#define STAGE_BYTES (16 * (WIDE * 2 + 64))      // rows g and g + 1 are in different banks
#define TOKENS 32                               // keys and values of so many tokens are a stage
#define X_PITCH(depth) ((depth) * 2 + 64)
#define NORM_PIECES (HIDDEN / 4 / WORKERS)      // of 4 numbers, of a thread
#define BATCH 8                                 // pieces that a thread waits for at once
#define PART_WORDS 132                          // of a part of a head's result
#define MIN_PART 32                             // keys in a part
#define NO_SCORE -1e30f
#define LANES 8                                 // threads that share a key
#define GROUPS (4 * WARPS)                      // of LANES threads

// floats for the sums of two tiles, or for the states of all warps
#define SUM_FLOATS (2 * WORKERS * 4)
#define STATE_FLOATS (WARPS * GROUP * (HEAD + 2))
#define SCRATCH_FLOATS (SUM_FLOATS > STATE_FLOATS ? SUM_FLOATS : STATE_FLOATS)

struct __align__(16) Pair { u32 a, a_tag, b, b_tag; };  // two words

__device__ __forceinline__ u64 load_word(const u64* at) {
  u64 r;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(r) : "l"(at));
  return r;
}

__device__ __forceinline__ Pair load_words(const u64* at) {
  u64 a, b;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at));
  return Pair{(u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32)};
}

__device__ __forceinline__ void store_word(u64* at, u32 value, u32 tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"((u64)tag << 32 | value) : "memory");
}

__device__ __forceinline__ void store_words(u64* at, u32 a, u32 b, u32 tag) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(at), "l"((u64)tag << 32 | a),
               "l"((u64)tag << 32 | b)
               : "memory");
}

// True for the first that calls it.
__device__ __forceinline__ bool claim(u32* at) {
  u32 before;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(before) : "l"(at) : "memory");
  return before == 0;
}

__device__ __forceinline__ u32 load_status(const u32* at) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}

__device__ __forceinline__ u64 now() {
  u64 v;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(v));
  return v;
}

// Between polls.
__device__ __forceinline__ void rest() {}

__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

// What a thread has while it computes.
struct Worker {
  const Args& a;
  const Task* task;
  u32 task_idx, base;  // the tag of phase 0
  u32 polls_left;
  u8* x;               // [R, depth], X_PITCH
  float* scratch;
  const u8* ring;
  u32 full, empty;
  const int* seq_len;
  Ring stage;
  u32 turn;            // tiles so far
  int warp, lane;
};

__device__ __forceinline__ bool has(const Pair& v, u32 tag) {
  return v.a_tag == tag && v.b_tag == tag;
}

struct Polled { Pair words; u32 polls_left; };

// Polls words until both have the tag. It returns what is there when the polls are used up.
__device__ __forceinline__ Polled poll(const u64* at, u32 tag, u32 polls_left, u32* status, u32 task_idx,
                                    u32 phase) {
  Pair v = load_words(at);
  while (!has(v, tag) && polls_left) {
    rest();
    if (--polls_left % 256 == 0 && load_status(status)) polls_left = 0;
    if (polls_left == 0 && claim(status)) {
      status[1] = blockIdx.x, status[2] = task_idx, status[3] = phase, status[4] = threadIdx.x;
    }
    v = load_words(at);
  }
  return Polled{v, polls_left};
}

__device__ __forceinline__ void ensure(Worker& w, Pair& v, const u64* at, u32 phase) {
  if (has(v, w.base + phase)) return;
  const Polled r = poll(at, w.base + phase, w.polls_left, w.a.status, w.task_idx, phase);
  v = r.words, w.polls_left = r.polls_left;
}

__device__ __forceinline__ void note(const Worker& w, int which) {
#if CLOCKS
  if (threadIdx.x == 0)
    w.a.clocks[((u64)blockIdx.x * NUM_TASKS + w.task_idx) * 3 + which] = now();
#endif
}

// A row's parts: the keys of each, and their number.
__device__ __forceinline__ u32 part_len(u32 len) {
  const u32 each = (len + SPLITS - 1) / SPLITS;
  return each > MIN_PART ? each : MIN_PART;
}
__device__ __forceinline__ u32 num_parts(u32 len) { return (len + part_len(len) - 1) / part_len(len); }

struct Unit { u32 row, head, part, from, to; bool is_last, is_real; };

// A unit of attention: keys from .. to − 1 of a row, for the queries of a key-value head. The last
// part ends with the step's own token.
__device__ __forceinline__ Unit unit_of(u32 unit, const int* seq_len) {
  Unit u;
  u.row = unit / (KV_HEADS * SPLITS), u.head = unit / SPLITS % KV_HEADS, u.part = unit % SPLITS;
  const u32 len = seq_len[u.row], each = part_len(len);
  u.is_real = u.part < num_parts(len), u.is_last = u.part + 1 == num_parts(len);
  u.from = u.part * each, u.to = u.is_last ? len - 1 : u.from + each;
  return u;
}

// the copying warp -------------------------------------------------------------------------------

__device__ __forceinline__ void copy_weights(const Task& t, u32 ring, u32 full, u32 empty, Ring& stage,
                                             u32 lane) {
  const u32 rows = t.flags & HALF ? 8 : 16, wide = t.flags & HALF ? 2 * WIDE : WIDE;
  const u32 upper = t.flags & SILU ? t.num_outs : 8;
  for (u32 tile = t.first; tile < t.first + t.count; tile++) {
    const u32 row = (t.flags & (SILU | HALF) ? tile * 8 : tile * 16) + lane % 8 + (lane < 8 ? 0 : upper);
    const u8* const from = t.first_input + (u64)row * t.depth * 2;
    for (u32 column = 0; column < t.depth; column += wide) {
      const u32 num_bytes = (t.depth - column < wide ? t.depth - column : wide) * 2;
      wait_for(empty + 8 * stage.at, stage.parity);
      if (lane == 0) expect(full + 8 * stage.at, num_bytes * rows);
      __syncwarp();
      if (lane < rows)
        copy(ring + stage.at * STAGE_BYTES + lane * (wide * 2 + 64), from + column * 2, num_bytes,
             full + 8 * stage.at);
      stage.advance(STAGES);
    }
  }
}

__device__ __forceinline__ void copy_keys(const Args& a, const Task& t, u32 ring, u32 full, u32 empty,
                                          Ring& stage, u32 lane, const int* seq_len) {
  for (u32 unit = t.first; unit < t.first + t.count; unit++) {
    const Unit u = unit_of(unit, seq_len);
    if (!u.is_real) continue;
    for (u32 token = u.from; token < u.to; token += TOKENS) {
      const u32 num = u.to - token < TOKENS ? u.to - token : TOKENS;
      u64 at = 0;
      if (lane < num) {
        const u32 key = token + lane;
        const u64 block = a.table[(u64)u.row * a.table_stride + key / a.block_size];
        at = block * a.block_stride + key % a.block_size * a.slot_stride + u.head * a.head_stride;
      }
      wait_for(empty + 8 * stage.at, stage.parity);
      if (lane == 0) expect(full + 8 * stage.at, num * HEAD * 4);
      __syncwarp();
      const u32 to = ring + stage.at * STAGE_BYTES + lane * HEAD * 2;
      if (lane < num) {
        copy(to, t.first_input + at * 2, HEAD * 2, full + 8 * stage.at);
        copy(to + TOKENS * HEAD * 2, t.second_input + at * 2, HEAD * 2, full + 8 * stage.at);
      }
      stage.advance(STAGES);
    }
  }
}

// products ---------------------------------------------------------------------------------------

// Waits for x, normed if NORM, and puts it into shared memory.
__device__ __forceinline__ void read_normed(Worker& w) {
  const Task& t = *w.task;
  uint2 weight[NORM_PIECES];
  const uint2* const norm = reinterpret_cast<const uint2*>(t.second_input);
#pragma unroll
  for (int i = 0; i < NORM_PIECES; i++) weight[i] = __ldg(norm + threadIdx.x + i * WORKERS);
  u32 x[ROWS * NORM_PIECES][2];
  const u64* const words = w.a.words + t.in_at + 2 * threadIdx.x;
#pragma unroll
  for (int first = 0; first < ROWS * NORM_PIECES; first += BATCH) {
    Pair v[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i < ROWS * NORM_PIECES) v[i] = load_words(words + 2 * (first + i) * WORKERS);
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i < ROWS * NORM_PIECES) {
        ensure(w, v[i], words + 2 * (first + i) * WORKERS, t.in_phase);
        x[first + i][0] = v[i].a, x[first + i][1] = v[i].b;
      }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < 2 * NORM_PIECES; i++) {
      const u32 word = x[row * NORM_PIECES + i / 2][i % 2];
      const float low = of_bf16(word & 0xffff), high = __uint_as_float(word & 0xffff0000);
      square += low * low + high * high;
    }
#pragma unroll
    for (int i = 16; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
    if (w.lane == 0) w.scratch[row * WARPS + w.warp] = square;
  }
  meet();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) square += w.scratch[row * WARPS + i];
    const float factor = rsqrtf(square / HIDDEN + w.a.eps);
#pragma unroll
    for (int i = 0; i < NORM_PIECES; i++) {
      u32 found[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 word = x[row * NORM_PIECES + i][j], by = j ? weight[i].y : weight[i].x;
        const float low = rounded(of_bf16(word & 0xffff) * factor) * of_bf16(by & 0xffff);
        const float high =
            rounded(__uint_as_float(word & 0xffff0000) * factor) * __uint_as_float(by & 0xffff0000);
        found[j] = to_bf16(low) | to_bf16(high) << 16;
      }
      u8* const to = w.x + row * X_PITCH(HIDDEN) + (threadIdx.x + i * WORKERS) * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(found[0], found[1]);
    }
  }
}

__device__ __forceinline__ void read_plain(Worker& w) {
  const Task& t = *w.task;
  const u32 each = t.depth / 4, total = ROWS * each;
  const u64* const words = w.a.words + t.in_at;
  for (u32 first = threadIdx.x; first < total; first += BATCH * WORKERS) {
    Pair v[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i * WORKERS < total) v[i] = load_words(words + 2 * (first + i * WORKERS));
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const u32 piece = first + i * WORKERS;
      if (piece >= total) continue;
      ensure(w, v[i], words + 2 * piece, t.in_phase);
      u8* const to = w.x + piece / each * X_PITCH(t.depth) + piece % each * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(v[i].a, v[i].b);
    }
  }
}

// The number of the first of the two results that a thread and its neighbour have together.
__device__ __forceinline__ u32 out_of(const Task& t, u32 tile, int g, int h) {
  return (t.flags & (SILU | HALF) ? tile * 8 : tile * 16 + 8 * h) + (g & ~1);
}

__device__ __forceinline__ const u64* residual_at(const Worker& w, u32 token, u32 out) {
  // a pair of words, of which one is read
  return w.a.words + w.task->add_at + (((u64)token * w.task->num_outs + out) / 2 & ~1ull);
}

struct Residual { Pair of[2][2]; };

__device__ __forceinline__ void finish(Worker& w, const float (&sum)[4], Residual& residual, u32 tile) {
  const Task& t = *w.task;
  const int g = w.lane / 4, thread = w.lane % 4;
  const bool is_silu = t.flags & SILU;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const u32 token = 2 * thread + j;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (h == 1 && t.flags & (SILU | HALF)) continue;
      float y = rounded(h ? sum[2 + j] : sum[j]);
      if (is_silu) y = rounded(y / (1.0f + __expf(-y))) * rounded(sum[2 + j]);
      const float other = __shfl_xor_sync(0xffffffff, y, 4);  // of the next weight row
      if (token >= ROWS || g & 1) continue;
      const u32 out = out_of(t, tile, g, h);
      float low = y, high = other;
      if (t.flags & ADD) {
        Pair& v = residual.of[h][j];
        const u64* const at = residual_at(w, token, out);
        ensure(w, v, at, t.add_phase);
        const u32 word = ((u64)token * t.num_outs + out) / 2 & 1 ? v.b : v.a;
        low = rounded(low) + of_bf16(word & 0xffff);
        high = rounded(high) + __uint_as_float(word & 0xffff0000);
      }
      const u32 word = to_bf16(low) | to_bf16(high) << 16;
      const u64 at = ((u64)token * t.num_outs + out) / 2;
      if (t.flags & LOGITS)
        reinterpret_cast<u32*>(w.a.logits)[at] = word;
      else
        store_word(w.a.words + t.out_at + at, word, w.base + t.out_phase);
    }
  }
}

__device__ __forceinline__ void product(Worker& w) {
  const Task& t = *w.task;
  if (t.flags & NORM)
    read_normed(w);
  else
    read_plain(w);
  meet();
  note(w, 1);
  const int g = w.lane / 4, thread = w.lane % 4;
  const bool is_half = t.flags & HALF;
  const u32 wide = is_half ? 2 * WIDE : WIDE, pitch = wide * 2 + 64;
  const u8* const x_row = w.x + g * X_PITCH(t.depth) + thread * 16;
  const bool has_x = g < ROWS;
  for (u32 tile = t.first; tile < t.first + t.count; tile++, w.turn++) {
    const bool is_mine = w.warp == (int)(w.turn % WARPS);  // this warp finishes the tile
    Residual residual = {};
    if (is_mine && t.flags & ADD && !(g & 1))
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (2 * thread + j < ROWS && !(h && is_half))
            residual.of[h][j] = load_words(residual_at(w, 2 * thread + j, out_of(t, tile, g, h)));
    float acc[2][4] = {};
    for (u32 column = 0; column < t.depth; column += wide) {
      const u32 num = t.depth - column < wide ? t.depth - column : wide;
      wait_for(w.full + 8 * w.stage.at, w.stage.parity);
      const u8* const from = w.ring + w.stage.at * STAGE_BYTES + g * pitch + thread * 16;
#pragma unroll 2
      for (u32 c = w.warp * 32; c < num; c += WARPS * 32) {
        const Four x = has_x ? load_four(x_row + (column + c) * 2) : Four{0, 0, 0, 0};
        const Four lower = load_four(from + c * 2);
        const Four upper = is_half ? Four{0, 0, 0, 0} : load_four(from + 8 * pitch + c * 2);
        multiply(acc[0], lower.a, upper.a, lower.b, upper.b, x.a, x.b);
        multiply(acc[1], lower.c, upper.c, lower.d, upper.d, x.c, x.d);
      }
      __syncwarp();
      if (w.lane == 0) arrive(w.empty + 8 * w.stage.at);
      w.stage.advance(STAGES);
    }
    float4* const sums = reinterpret_cast<float4*>(w.scratch) + (w.turn & 1) * WORKERS;
    sums[w.warp * 32 + w.lane] = make_float4(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1],
                                             acc[0][2] + acc[1][2], acc[0][3] + acc[1][3]);
    meet();
    if (is_mine) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < WARPS; k++) {
        const float4 one = sums[k * 32 + w.lane];
        sum[0] += one.x, sum[1] += one.y, sum[2] += one.z, sum[3] += one.w;
      }
      finish(w, sum, residual, tile);
    }
  }
  meet();  // the next task writes to the scratch memory
}

// attention --------------------------------------------------------------------------------------

// Of a head: numbers 8 · l .. and 64 + 8 · l .. of the thread l of LANES.
struct Numbers { float of[16]; };

struct HeadWords { Pair of[4]; };

__device__ __forceinline__ HeadWords load_head(const u64* words, int l) {
  HeadWords r;
#pragma unroll
  for (int i = 0; i < 4; i++) r.of[i] = load_words(words + l * 4 + (i & 1) * 2 + (i >> 1) * 32);
  return r;
}

__device__ __forceinline__ Numbers ensured(Worker& w, HeadWords& v, const u64* words, int l) {
  Numbers r;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    ensure(w, v.of[i], words + l * 4 + (i & 1) * 2 + (i >> 1) * 32, w.task->in_phase);
    r.of[i * 4] = of_bf16(v.of[i].a & 0xffff), r.of[i * 4 + 1] = __uint_as_float(v.of[i].a & 0xffff0000);
    r.of[i * 4 + 2] = of_bf16(v.of[i].b & 0xffff);
    r.of[i * 4 + 3] = __uint_as_float(v.of[i].b & 0xffff0000);
  }
  return r;
}

__device__ __forceinline__ void numbers_of(const u8* at, float (&r)[16]) {  // of 256 bytes, at l · 16
  const Four half[2] = {load_four(at), load_four(at + 128)};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 word = word_of(half[i / 4], i % 4);
    r[2 * i] = of_bf16(word & 0xffff), r[2 * i + 1] = __uint_as_float(word & 0xffff0000);
  }
}

__device__ __forceinline__ void norm_and_rotate(Numbers& v, const u16* norm, const float* cos_sin, int l,
                                                float eps) {
  if (norm) {
    float square = 0, by[16];
    numbers_of(reinterpret_cast<const u8*>(norm) + l * 16, by);
#pragma unroll
    for (int i = 0; i < 16; i++) square += v.of[i] * v.of[i];
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
    const float factor = rsqrtf(square / HEAD + eps);
#pragma unroll
    for (int i = 0; i < 16; i++) v.of[i] = rounded(rounded(v.of[i] * factor) * by[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float c = cos_sin[l * 8 + i], s = cos_sin[64 + l * 8 + i], x = v.of[i], y = v.of[8 + i];
    v.of[i] = rounded(x * c - y * s), v.of[8 + i] = rounded(y * c + x * s);
  }
}

// Sums over the keys that a group of LANES threads has seen.
struct State { float most, sum, acc[16]; };

__device__ __forceinline__ void see(State (&s)[GROUP], const Numbers (&q)[GROUP], const float (&k)[16],
                                    const float (&v)[16], bool is_real) {
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float score = 0;
#pragma unroll
    for (int j = 0; j < 16; j++) score += q[i].of[j] * k[j];
#pragma unroll
    for (int j = LANES / 2; j; j /= 2) score += __shfl_xor_sync(0xffffffff, score, j);
    if (!is_real) continue;
    const float most = fmaxf(s[i].most, score), before = exp2f(s[i].most - most);
    const float weight = exp2f(score - most);
    s[i].most = most, s[i].sum = s[i].sum * before + weight;
#pragma unroll
    for (int j = 0; j < 16; j++) s[i].acc[j] = s[i].acc[j] * before + weight * v[j];
  }
}

__device__ __forceinline__ void store_head(u16* to, const Numbers& v, int l) {
#pragma unroll
  for (int i = 0; i < 16; i += 2)
    *reinterpret_cast<u32*>(to + (i < 8 ? 0 : 56) + l * 8 + i) =
        to_bf16(v.of[i]) | to_bf16(v.of[i + 1]) << 16;
}

// Joins the states of all groups of a program, and stores the result or, of several parts, a part.
__device__ __forceinline__ void join(Worker& w, State (&s)[GROUP], const Unit& u, u32 parts) {
  const int l = w.lane % LANES;
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float most = s[i].most;
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
    const float factor = exp2f(s[i].most - most);
    float sum = s[i].sum * factor;
    sum += __shfl_xor_sync(0xffffffff, sum, 8);
    sum += __shfl_xor_sync(0xffffffff, sum, 16);
    float* const state = w.scratch + (w.warp * GROUP + i) * (HEAD + 2);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      float acc = s[i].acc[j] * factor;
      acc += __shfl_xor_sync(0xffffffff, acc, 8);
      acc += __shfl_xor_sync(0xffffffff, acc, 16);
      if (w.lane < LANES) state[(j < 8 ? 0 : 56) + l * 8 + j] = acc;
    }
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
  const float* const cos_sin = w.a.cos_sin + w.a.rope_pos[u.row] * HEAD;
  const u64* const words = w.a.words + t.in_at + u.row * (QKV / 2);
  const u64* const q_at = words + u.head * GROUP * (HEAD / 2);
  const u64* const k_at = words + (HEADS + u.head) * (HEAD / 2);
  const u64* const v_at = k_at + KV_HEADS * (HEAD / 2);
  const bool has_new = u.is_last && w.warp == 0;  // this warp has the step's own token
  HeadWords q_words[GROUP], k_words = {}, v_words = {};
#pragma unroll
  for (int i = 0; i < GROUP; i++) q_words[i] = load_head(q_at + i * (HEAD / 2), l);
  if (has_new) k_words = load_head(k_at, l), v_words = load_head(v_at, l);
  Numbers q[GROUP];
  State s[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    q[i] = ensured(w, q_words[i], q_at + i * (HEAD / 2), l);
    norm_and_rotate(q[i], t.q_norm, cos_sin, l, w.a.eps);
    s[i].most = NO_SCORE, s[i].sum = 0;
#pragma unroll
    for (int j = 0; j < 16; j++) q[i].of[j] *= w.a.scale, s[i].acc[j] = 0;
  }
  if (has_new) {
    Numbers k = ensured(w, k_words, k_at, l), v = ensured(w, v_words, v_at, l);
    norm_and_rotate(k, t.k_norm, cos_sin, l, w.a.eps);
    see(s, q, k.of, v.of, w.lane < LANES);
    if (w.lane < LANES) {
      const u64 slot = w.a.slot[u.row], at = slot / w.a.block_size * w.a.block_stride +
                                             slot % w.a.block_size * w.a.slot_stride +
                                             u.head * w.a.head_stride;
      store_head(const_cast<u16*>(reinterpret_cast<const u16*>(t.first_input)) + at, k, l);
      store_head(const_cast<u16*>(reinterpret_cast<const u16*>(t.second_input)) + at, v, l);
    }
  }
  note(w, 1);
  for (u32 token = u.from; token < u.to; token += TOKENS) {
    const u32 num = u.to - token < TOKENS ? u.to - token : TOKENS;
    wait_for(w.full + 8 * w.stage.at, w.stage.parity);
    const u8* const from = w.ring + w.stage.at * STAGE_BYTES + l * 16;
    for (u32 first = 0; first < num; first += GROUPS) {
      const u32 i = first + w.warp * 4 + w.lane / LANES;
      const bool is_real = i < num;
      float k[16], v[16];
      numbers_of(from + (is_real ? i : 0) * (HEAD * 2), k);
      numbers_of(from + ((is_real ? i : 0) + TOKENS) * (HEAD * 2), v);
      see(s, q, k, v, is_real);
    }
    __syncwarp();
    if (w.lane == 0) arrive(w.empty + 8 * w.stage.at);
    w.stage.advance(STAGES);
  }
  join(w, s, u, num_parts(w.seq_len[u.row]));
}

__device__ __forceinline__ void attend(Worker& w) {
  for (u32 unit = w.task->first; unit < w.task->first + w.task->count; unit++) {
    const Unit u = unit_of(unit, w.seq_len);
    if (u.is_real) attend_unit(w, u);
    meet();  // the next unit writes to the scratch memory
  }
}

// Waits until a word has the tag; returns its data.
__device__ __forceinline__ float ensured(Worker& w, u64 word, const u64* at, u32 phase) {
  if ((u32)(word >> 32) != w.base + phase) {
    Pair both = {};
    const bool is_second = (u64)at & 8;
    ensure(w, both, at - is_second, phase);
    word = is_second ? both.b : both.a;
  }
  return __uint_as_float((u32)word);
}

// Merges the parts of heads, whose units are a row's query heads; HEAD threads each.
__device__ __forceinline__ void merge(Worker& w) {
  const Task& t = *w.task;
  const u32 d = threadIdx.x % HEAD;
  for (u32 i = threadIdx.x / HEAD; i < t.count; i += WORKERS / HEAD) {
    const u32 unit = t.first + i, parts = num_parts(w.seq_len[unit / HEADS]);
    if (parts == 1) continue;  // its result is there already
    const u64* const first = w.a.words + t.in_at + (u64)unit * SPLITS * PART_WORDS;
    u64 v[SPLITS], lse[SPLITS];
#pragma unroll
    for (int k = 0; k < SPLITS; k++) {
      const u64* const part = first + (k < parts ? k : 0) * PART_WORDS;
      v[k] = load_word(part + d), lse[k] = load_word(part + HEAD);
    }
    float most = NO_SCORE, sum = 0, result = 0;
    float value[SPLITS], weight[SPLITS];
#pragma unroll
    for (int k = 0; k < SPLITS; k++) {
      const u64* const part = first + (k < parts ? k : 0) * PART_WORDS;
      value[k] = ensured(w, v[k], part + d, t.in_phase);
      weight[k] = k < parts ? ensured(w, lse[k], part + HEAD, t.in_phase) : NO_SCORE;
      most = fmaxf(most, weight[k]);
    }
#pragma unroll
    for (int k = 0; k < SPLITS; k++) {
      const float factor = exp2f(weight[k] - most);
      sum += factor, result += factor * value[k];
    }
    note(w, 1);
    result /= sum;
    const float next = __shfl_xor_sync(0xffffffff, result, 1);
    if (d % 2 == 0)
      store_word(w.a.words + t.out_at + (unit * HEAD + d) / 2, to_bf16(result) | to_bf16(next) << 16,
                 w.base + t.out_phase);
  }
}

// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void embed(Worker& w) {
  const Task& t = *w.task;
  for (u32 i = t.first + threadIdx.x; i < t.first + t.count; i += WORKERS)
    store_word(w.a.words + t.out_at + i, reinterpret_cast<const u32*>(w.a.h)[i], w.base + t.out_phase);
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1) persistent(const __grid_constant__ Args a) {
  extern __shared__ u8 unaligned[];
  u8* const shared = unaligned + (-shared_address(unaligned) & 127u);
  // the ring | tasks | barriers | lengths | scratch | x
  Task* const tasks = reinterpret_cast<Task*>(shared + STAGES * STAGE_BYTES);
  u8* const barriers = reinterpret_cast<u8*>(tasks + NUM_TASKS);
  int* const seq_len = reinterpret_cast<int*>(barriers + 16 * STAGES);
  float* const scratch = reinterpret_cast<float*>(seq_len + 12);
  u8* const x = reinterpret_cast<u8*>(scratch + SCRATCH_FLOATS);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    seq_len[8] = load_status(a.status);
  }
  if (threadIdx.x < ROWS) seq_len[threadIdx.x] = a.seq_len[threadIdx.x];
  const Four* const from = reinterpret_cast<const Four*>(a.tasks + (u64)blockIdx.x * NUM_TASKS);
  for (u32 i = threadIdx.x; i < NUM_TASKS * sizeof(Task) / 16; i += WORKERS + 32)
    reinterpret_cast<Four*>(tasks)[i] = from[i];
  const u32 step = a.steps[blockIdx.x] + 1;
  __syncthreads();
  if (seq_len[8]) return;  // an earlier step failed
  if (warp == WARPS) {
    Ring stage;
    stage.parity = 1;  // a first pass finds every place empty
    for (u32 i = 0; i < NUM_TASKS && tasks[i].kind != END; i++)
      if (tasks[i].kind == PRODUCT)
        copy_weights(tasks[i], shared_address(shared), full, empty, stage, lane);
      else if (tasks[i].kind == ATTEND)
        copy_keys(a, tasks[i], shared_address(shared), full, empty, stage, lane, seq_len);
    return;
  }
  Worker w = {a, tasks, 0, step * a.num_phases, a.max_polls, x, scratch, shared, full, empty, seq_len, {}, 0,
              warp, lane};
  for (; w.task_idx < NUM_TASKS && w.task->kind != END; w.task_idx++, w.task++) {
    note(w, 0);
    if (w.task->kind == PRODUCT)
      product(w);
    else if (w.task->kind == ATTEND)
      attend(w);
    else if (w.task->kind == MERGE)
      merge(w);
    else
      embed(w);
    note(w, 2);
  }
  if (threadIdx.x == 0) a.steps[blockIdx.x] = step;
}
