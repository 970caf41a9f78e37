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
#define BATCH 16                                // pieces that a thread waits for at once
#define PART_WORDS 132                          // of a part of a head's result
#define MIN_PART 32                             // keys in a part
#define NO_SCORE -1e30f
#define LANES (GROUP > 2 ? 16 : 8)              // threads that share a key
#define EACH (HEAD / LANES)                     // numbers of a thread
#define GROUPS (WORKERS / LANES)                // of LANES threads

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

// Counts a poll in vain. False if the polls are used up: then the words are what they are.
__device__ __forceinline__ bool may_poll(Worker& w, u32 phase) {
  if (w.polls_left == 0) return false;
  rest();
  if (--w.polls_left % 256 == 0 && load_status(w.a.status)) w.polls_left = 0;
  if (w.polls_left == 0 && claim(w.a.status)) {
    u32* const status = w.a.status;
    status[1] = blockIdx.x, status[2] = w.task_idx, status[3] = phase, status[4] = threadIdx.x;
  }
  return true;
}

// Waits for N pairs of words of a phase; `at(i)` is the place of pair i, or null. All loads are on
// their way at the same time, since each takes as long as a result's whole way.
template <int N, class At>
__device__ __forceinline__ void fetch(Worker& w, Pair (&v)[N], u32 phase, At at) {
  const u32 tag = w.base + phase;
#pragma unroll
  for (int i = 0; i < N; i++)
    if (at(i)) v[i] = load_words(at(i));
  while (true) {
    bool is_missing = false;
#pragma unroll
    for (int i = 0; i < N; i++) is_missing |= at(i) && !has(v[i], tag);
    if (!is_missing || !may_poll(w, phase)) return;
#pragma unroll
    for (int i = 0; i < N; i++)
      if (at(i) && !has(v[i], tag)) v[i] = load_words(at(i));
  }
}

// The same for single words.
template <int N, class At>
__device__ __forceinline__ void fetch_single(Worker& w, u64 (&v)[N], u32 phase, At at) {
  const u32 tag = w.base + phase;
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = load_word(at(i));
  while (true) {
    bool is_missing = false;
#pragma unroll
    for (int i = 0; i < N; i++) is_missing |= (u32)(v[i] >> 32) != tag;
    if (!is_missing || !may_poll(w, phase)) return;
#pragma unroll
    for (int i = 0; i < N; i++)
      if ((u32)(v[i] >> 32) != tag) v[i] = load_word(at(i));
  }
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
    fetch(w, v, t.in_phase, [&](int i) -> const u64* {
      return first + i < ROWS * NORM_PIECES ? words + 2 * (first + i) * WORKERS : nullptr;
    });
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i < ROWS * NORM_PIECES) x[first + i][0] = v[i].a, x[first + i][1] = v[i].b;
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
    fetch(w, v, t.in_phase, [&](int i) -> const u64* {
      return first + i * WORKERS < total ? words + 2 * (first + i * WORKERS) : nullptr;
    });
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const u32 piece = first + i * WORKERS;
      if (piece >= total) continue;
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
        if (!has(v, w.base + t.add_phase)) {
          Pair again[1];
          fetch(w, again, t.add_phase, [&](int) { return at; });
          v = again[0];
        }
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

// Over the groups of a warp.
__device__ __forceinline__ float sum_of_groups(float v) {
#pragma unroll
  for (int i = LANES; i < 32; i *= 2) v += __shfl_xor_sync(0xffffffff, v, i);
  return v;
}

// Joins the states of all groups of a program, and stores the result or, of several parts, a part.
__device__ __forceinline__ void join(Worker& w, State (&s)[GROUP], const Unit& u, u32 parts) {
  const int l = w.lane % LANES;
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float most = s[i].most;
#pragma unroll
    for (int j = LANES; j < 32; j *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, j));
    const float factor = exp2f(s[i].most - most), sum = sum_of_groups(s[i].sum * factor);
    float* const state = w.scratch + (w.warp * GROUP + i) * (HEAD + 2);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const float acc = sum_of_groups(s[i].acc[j] * factor);
      if (w.lane < LANES) state[place_of(l, j)] = acc;
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
  Packed q_norm = {}, k_norm = {};
  if (t.q_norm) q_norm = load_packed(t.q_norm, l);
  if (t.k_norm && has_new) k_norm = load_packed(t.k_norm, l);
  Rotation by;
#pragma unroll
  for (int i = 0; i < EACH / 2; i++)
    by.cos[i] = cos_sin[l * (EACH / 2) + i], by.sin[i] = cos_sin[HEAD / 2 + l * (EACH / 2) + i];
  u64 new_at = 0;
  if (has_new) {
    const u32 slot = (u32)w.a.slot[u.row], block = slot / w.a.block_size;
    new_at = block * w.a.block_stride + slot % w.a.block_size * w.a.slot_stride +
             u.head * w.a.head_stride;
  }
  constexpr int PAIRS = EACH / 4;
  Pair found[PAIRS * (GROUP + 2)];  // of queries, key and value
  fetch(w, found, t.in_phase, [&](int i) -> const u64* {
    const int head = i / PAIRS;
    if (head < GROUP) return head_at(q_at + head * (HEAD / 2), l, i % PAIRS);
    return has_new ? head_at(head == GROUP ? k_at : v_at, l, i % PAIRS) : nullptr;
  });
  Numbers q[GROUP];
  State s[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    q[i] = numbers_of(found + PAIRS * i);
    norm_and_rotate(q[i], q_norm, by, t.q_norm, w.a.eps);
    s[i].most = NO_SCORE, s[i].sum = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) q[i].of[j] *= w.a.scale, s[i].acc[j] = 0;
  }
  if (has_new) {
    Numbers k = numbers_of(found + PAIRS * GROUP), v = numbers_of(found + PAIRS * (GROUP + 1));
    norm_and_rotate(k, k_norm, by, t.k_norm, w.a.eps);
    see(s, q, k, v, w.lane < LANES);
    if (w.lane < LANES) {
      store_head(reinterpret_cast<u16*>(const_cast<u8*>(t.first_input)) + new_at, k, l);
      store_head(reinterpret_cast<u16*>(const_cast<u8*>(t.second_input)) + new_at, v, l);
    }
  }
  note(w, 1);
  for (u32 token = u.from; token < u.to; token += TOKENS) {
    const u32 num = u.to - token < TOKENS ? u.to - token : TOKENS;
    wait_for(w.full + 8 * w.stage.at, w.stage.parity);
    const u8* const from = w.ring + w.stage.at * STAGE_BYTES;
    for (u32 first = 0; first < num; first += GROUPS) {
      const u32 i = first + threadIdx.x / LANES;
      const bool is_real = i < num;
      const u8* const key = from + (is_real ? i : 0) * (HEAD * 2);
      see(s, q, numbers_of(load_packed(key, l)),
          numbers_of(load_packed(key + TOKENS * HEAD * 2, l)), is_real);
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

// Merges the parts of heads, whose units are a row's query heads; HEAD threads each.
__device__ __forceinline__ void merge(Worker& w) {
  const Task& t = *w.task;
  const u32 d = threadIdx.x % HEAD;
  for (u32 i = threadIdx.x / HEAD; i < t.count; i += WORKERS / HEAD) {
    const u32 unit = t.first + i, parts = num_parts(w.seq_len[unit / HEADS]);
    if (parts == 1) continue;  // its result is there already
    const u64* const first = w.a.words + t.in_at + (u64)unit * SPLITS * PART_WORDS;
    u64 v[2 * SPLITS];  // a number, and the log of the sums, of each part
    fetch_single(w, v, t.in_phase, [&](int k) {
      return first + (k / 2 < parts ? k / 2 : 0) * PART_WORDS + (k % 2 ? HEAD : d);
    });
    float most = NO_SCORE, sum = 0, result = 0, weight[SPLITS];
#pragma unroll
    for (int k = 0; k < SPLITS; k++) {
      weight[k] = k < parts ? __uint_as_float((u32)v[2 * k + 1]) : NO_SCORE;
      most = fmaxf(most, weight[k]);
    }
#pragma unroll
    for (int k = 0; k < SPLITS; k++) {
      const float factor = exp2f(weight[k] - most);
      sum += factor, result += factor * __uint_as_float((u32)v[2 * k]);
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
