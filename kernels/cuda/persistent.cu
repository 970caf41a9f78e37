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
#define BATCH (ROWS == 1 ? 4 : ROWS == 2 ? 6 : 12)  // pieces that a thread waits for at once
#define NORM_BATCH (ROWS * NORM_PIECES < 16 ? ROWS * NORM_PIECES : 16)
#define PART_WORDS 132                          // of a part of a head's result
#define MIN_PART 32                             // keys in a part
#define NO_SCORE -1e30f
#define LANES (GROUP > 2 ? 16 : 8)              // threads that share a key
#define EACH (HEAD / LANES)                     // numbers of a thread
#define GROUPS (WORKERS / LANES)                // of LANES threads

#define AT_ONCE 4                               // tiles whose sums are added at the same time
#define COLUMN_PAIRS ((ROWS + 1) / 2)
#define SUMS_OF_TILE (8 * COLUMN_PAIRS * WARPS)

// floats for the sums of two times AT_ONCE tiles, or for the states of all warps
#define SUM_FLOATS (2 * AT_ONCE * SUMS_OF_TILE * 4)
#define STATE_FLOATS (WARPS * GROUP * (HEAD + 2))
#define SCRATCH_FLOATS (SUM_FLOATS > STATE_FLOATS ? SUM_FLOATS : STATE_FLOATS)

#include "persistent_words.cuh"

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

#include "persistent_product.cuh"
#include "persistent_attention.cuh"

// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void embed(Worker& w) {
  const Task& t = *w.task;
  for (u32 i = t.first + threadIdx.x; i < t.first + t.count; i += WORKERS)
    store_word(w.a.words + t.out_at + i, reinterpret_cast<const u32*>(w.a.h)[i], w.base + t.out_phase);
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1) persistent(const __grid_constant__ Args a) {
  extern __shared__ u8 unaligned[];
  u8* const shared = unaligned + (-shared_address(unaligned) & 127u);
  // the ring | tasks | barriers | lengths | squares | queries | own key and value | scratch | x
  Task* const tasks = reinterpret_cast<Task*>(shared + STAGES * STAGE_BYTES);
  u8* const barriers = reinterpret_cast<u8*>(tasks + NUM_TASKS);
  int* const seq_len = reinterpret_cast<int*>(barriers + 16 * STAGES);
  float* const squares = reinterpret_cast<float*>(seq_len + 12);
  float* const queries = squares + 8 * WARPS;
  u16* const own = reinterpret_cast<u16*>(queries + GROUP * HEAD);
  float* const scratch = queries + (GROUP + 1) * HEAD;
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
  Worker w = {a,       tasks, 0,      step * a.num_phases, a.max_polls, x,  scratch, squares,
              queries, own,   shared, full,                empty,       seq_len, {},  0,
              warp,    lane};
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
