// A decode step as one kernel, of a model that computes in bf16: a program on each multiprocessor goes
// through its list of tasks (persistent.py; docs/persistent.md).
//
// COPIERS warps copy: they go through the tasks ahead of the others and fill a ring of STAGES with the
// weights and the keys and values of earlier tokens that they read, each some rows of every stage.
// These are there before the step, so they wait for nothing but places in the ring, and memory is not
// idle while tasks wait for results. Only for the weights of experts they wait for the router's
// results. WARPS warps compute.
//
// Results go from task to task through words of 64 bits in global memory: 32 bits of data, two numbers
// in bf16, and a tag. Parts of attention have words of 128 bits, with three numbers in fp32. A word is
// stored and loaded as a whole, so a reader that finds the tag of the phase that it waits for has the
// data too: nothing is counted, cleared or fenced. A tag is
// the number of the step times the number of phases, plus the phase; each program counts the steps.
// A thread polls at most `max_polls` times in a step. Then it writes to `status` which task waited for
// what, and goes on without waiting, so that the kernel ends.
//
// Constants, by -D: ROWS, HIDDEN, FFN (of a token's experts together), EXPERTS (0: none), TOP_K, EXPERT_FFN,
// NORMALIZE, HEADS, KV_HEADS, SPLITS (parts of a row's keys), QKV_HALF, OUT_HALF, DOWN_HALF and HEAD_HALF
// (their tiles are halves), NUM_TASKS (of a program), STAGES, IN_FLIGHT and WAITING_IN_FLIGHT (that memory is
// asked for at a time), MAX_CHUNK (columns of x in registers), RESIDENT_BYTES (of x that stays in shared
// memory, at most), SHARED_BYTES, WARPS, COPIERS, CLOCKS (times of tasks are kept), ALL_ARRIVE (each thread
// arrives at the barrier of a stage that it has read, not the first of a warp for all: for race checkers),
// SEVERAL (rows may be tokens of one request, one after the other: each attends to those before it too),
// KEEPS (hidden states after some layers are stored for readers behind the step), QKV_BIAS, LAYER_BITS and
// HEAD_BITS (of a weight: 16, 8 for float8_e4m3fn, 4 for integers in groups of GROUP_COLUMNS), BLOCK (scales
// of fp8 are of blocks of so many rows and columns, or of rows), SCALE (of scales: 0 fp32, 1 bf16, 2 fp16),
// OFFSET (groups have one).
//
// t thread of four | g group of four threads: the weight row in a half of a tile, and the row of x

#define BITS 4  // of codes that are integers
#include "packed_codes.cuh"

struct __align__(16) Task {
  const u8* first_input;   // PRODUCT weight [O, D] or of all experts, ATTEND keys [C, B, K, H]
  const u8* second_input;  // PRODUCT norm [D] or, with ADD, where results are kept, or none; ATTEND values
  const u16* q_norm;       // ATTEND [H] or none, PRODUCT a bias [O] or none, or offsets of codes
  const u16* k_norm;       // PRODUCT of codes their scales
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
  u64* clocks;            // [grid, NUM_TASKS, TIMES]
  u64 block_stride, slot_stride, head_stride;  // of keys and values, in numbers
  u64 kept_stride;            // of rows of kept results, in numbers
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
#define EXPERT 32  // of the experts that a token chose; with SILU, by the words from `add_at` on
#define OF_FP8 64    // the weights are in fp8
#define OF_INT4 128  // the weights are integers of 4 bits
#define CODED (OF_FP8 | OF_INT4)

// times of a task: its inputs have arrived, are in shared memory, are computed with
#define START 0
#define ARRIVED 1
#define READY 2
#define COMPUTED 3
#define FINISHED 4
#define TIMES 5

#define WORKERS (32 * WARPS)
#define GROUP (HEADS / KV_HEADS)
#define HEAD 128
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD)
#define WIDE 512                                // columns of a stage with 16 rows
#define GROUP_COLUMNS 128                       // that share a scale of integers
// Behind a row of a stage, so that few of the rows that are read together share banks.
#define ROW_END(flags) ((flags) & OF_FP8 ? 32 : 64)
#define STAGE_BYTES (16 * (WIDE * 2 + 64))
#define TOKENS 32                               // keys and values of so many tokens are a stage
#define MIN_PART 32                             // keys in a part
#define NO_SCORE -1e30f

#define POLLS 256                               // of a thread, before it looks for a failure
#define AT_ONCE 4                               // tiles whose sums are added at the same time
#define COLUMN_PAIRS ((ROWS + 1) / 2)
#define MAX_OWN (SEVERAL ? ROWS : 1)            // keys of the step that a row attends to
#define SUMS_OF_TILE (8 * COLUMN_PAIRS * WARPS)

// shared memory: the ring | tasks | barriers of stages that are full, and empty | lengths (below) | the
// experts of rows, and their weights | squares of rows [ROWS, WARPS] | queries [GROUP, HEAD] | the step's
// own keys and values [MAX_OWN, 2, HEAD] | scores [2, GROUP, TOKENS] | sums of tiles | x, of each warp its
// columns
//
// lengths [20]: 0 .. 7 each row's tokens up to its request's first one in the step, 8 whether an earlier
// step has failed, 9 whether results are waited for, 12 .. 19 `num_own` of each row
#define AT_TASKS (STAGES * STAGE_BYTES)
#define AT_FULL (AT_TASKS + NUM_TASKS * 80)
#define AT_EMPTY (AT_FULL + 8 * STAGES)
#define AT_LENS (AT_EMPTY + 8 * STAGES)
#define AT_CHOSEN (AT_LENS + 80)
#define AT_SHARES (AT_CHOSEN + ROWS * TOP_K * 4)
#define AT_SQUARES (AT_CHOSEN + (ROWS * TOP_K * 8 + 15) / 16 * 16)
#define AT_QUERIES (AT_SQUARES + 8 * WARPS * 4)
#define AT_OWN (AT_QUERIES + GROUP * HEAD * 4)
#define AT_SCORES (AT_OWN + MAX_OWN * HEAD * 4)
#define AT_SUMS (AT_SCORES + 2 * GROUP * TOKENS * 4)
#define AT_X (AT_SUMS + 2 * AT_ONCE * SUMS_OF_TILE * 16)

template <class T>
__device__ __forceinline__ T* shared(u32 at) {
  extern __shared__ __align__(16) u8 memory[];
  return reinterpret_cast<T*>(memory + at);
}

__device__ __forceinline__ u32 full_barrier(u32 stage) {
  return shared_address(shared<u8>(AT_FULL)) + 8 * stage;
}
__device__ __forceinline__ u32 empty_barrier(u32 stage) {
  return shared_address(shared<u8>(AT_EMPTY)) + 8 * stage;
}

// The columns of x that are in registers at a time.
__device__ __forceinline__ constexpr u32 chunk_of(u32 depth) {
  const u32 num = (depth + MAX_CHUNK - 1) / MAX_CHUNK;
  return depth % (num * 2 * WIDE) ? (depth < MAX_CHUNK ? depth : MAX_CHUNK) : depth / num;
}

#include "persistent_words.cuh"
#include "persistent_experts.cuh"

// The parts of a row's earlier keys: the keys of each, and the number of parts, at least one.
__device__ __forceinline__ u32 part_len(u32 len) {
  const u32 each = (len - 1 + SPLITS - 1) / SPLITS;
  return each > MIN_PART ? each : MIN_PART;
}
__device__ __forceinline__ u32 num_parts(u32 len) {
  return len < 2 ? 1 : (len - 1 + part_len(len) - 1) / part_len(len);
}

// The tokens of the step that a row attends to: its own, and those before it of the same request.
__device__ __forceinline__ u32 num_own(u32 row) { return SEVERAL ? shared<int>(AT_LENS)[12 + row] : 1; }

struct Unit { u32 row, head, part, from, to; bool is_last, is_real; };

// A unit of attention: keys from .. to − 1 of a row, for the queries of a key-value head. The last
// part ends with the step's own tokens.
__device__ __forceinline__ Unit unit_of(u32 unit) {
  Unit u;
  u.row = unit / (KV_HEADS * SPLITS), u.head = unit / SPLITS % KV_HEADS, u.part = unit % SPLITS;
  const u32 len = shared<int>(AT_LENS)[u.row], each = part_len(len);
  u.is_real = u.part < num_parts(len), u.is_last = u.part + 1 == num_parts(len);
  u.from = u.part * each, u.to = u.is_last ? len - 1 : u.from + each;
  return u;
}

#include "persistent_copies.cuh"
#include "persistent_codes.cuh"
#include "persistent_product.cuh"
#include "persistent_scores.cuh"
#include "persistent_attention.cuh"

// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void embed(Worker& w) {
  const Task& t = *w.task;
  for (u32 i = t.first + threadIdx.x; i < t.first + t.count; i += WORKERS)
    store_word(w.a.words + t.out_at + i, reinterpret_cast<const u32*>(w.a.h)[i], w.base + t.out_phase);
}

__device__ __forceinline__ constexpr u32 code_flag(u32 bits) {
  return bits == 8 ? OF_FP8 : bits == 4 ? OF_INT4 : 0;
}

__device__ __forceinline__ void multiply_by_weight(Worker& w) {
  constexpr u32 OF_EXPERTS = EXPERTS ? EXPERT : 0, CODES = code_flag(LAYER_BITS);
  const u32 flags = w.task->flags;
  if (flags & SILU)
    product<HIDDEN, NORM | SILU | OF_EXPERTS | CODES>(w);
  else if (flags & LOGITS)
    product<HIDDEN, NORM | LOGITS | (HEAD_HALF ? HALF : 0) | code_flag(HEAD_BITS)>(w);
  else if (EXPERTS && CODES && flags & NORM && !(flags & CODED))  // the router
    product<HIDDEN, NORM | (QKV_HALF ? HALF : 0)>(w);
  else if (flags & NORM)
    product<HIDDEN, NORM | (QKV_HALF ? HALF : 0) | CODES>(w);
  else if (w.task->depth == HEADS * HEAD && !(flags & EXPERT))  // or both have this depth
    product<HEADS * HEAD, ADD | (OUT_HALF ? HALF : 0) | CODES>(w);
  else
    product<FFN, ADD | (DOWN_HALF ? HALF : 0) | OF_EXPERTS | CODES>(w);
}

__device__ __forceinline__ Worker worker(const Args& a, const Task* tasks, u32 step) {
  return {a, tasks, 0, step * a.num_phases, a.max_polls, {}, 0, (int)threadIdx.x / 32,
          (int)threadIdx.x % 32};
}

__device__ __forceinline__ void copy_tasks(const Args& a, const Task* tasks, u32 step) {
  Worker w = worker(a, tasks, step);
  w.stage.parity = 1;  // a first pass finds every place empty
  for (; w.task_idx < NUM_TASKS && w.task->kind != END; w.task_idx++, w.task++) {
    const u32 kind = w.task->kind, flags = w.task->flags;
    if (EXPERTS && flags & EXPERT && flags & SILU) choose_experts(w);
    if (kind == PRODUCT)
      copy_weights(w);
    else if (kind == ATTEND)
      copy_keys(w);
  }
}

__device__ __forceinline__ void run_tasks(const Args& a, const Task* tasks, u32 step) {
  Worker w = worker(a, tasks, step);
  for (; w.task_idx < NUM_TASKS && w.task->kind != END; w.task_idx++, w.task++) {
    // what a task needs of these is made in the task: kept for all tasks, it would fill registers
    asm volatile("" : "+r"(w.warp), "+r"(w.lane));
    note(w, START);
    if (w.task->kind == PRODUCT)
      multiply_by_weight(w);
    else if (w.task->kind == ATTEND)
      attend(w);
    else if (w.task->kind == MERGE)
      merge(w);
    else
      embed(w);
    note(w, FINISHED);
  }
  if (threadIdx.x == 0) a.steps[blockIdx.x] = step;
}

// Whether the token of a row is the next one of the request whose token the row before it has: the place
// before its own in its cache is that row's.
__device__ __forceinline__ bool follows(const Args& a, u32 row) {
  const int before = a.seq_len[row] - 2;
  if (row == 0 || before < 0) return false;
  const u64 block = a.table[(u64)row * a.table_stride + before / a.block_size];
  return block * a.block_size + before % a.block_size == (u64)a.slot[row - 1];
}

// Four warps share a number of registers: those of the copying warps have few, so the others have more.
extern "C" __global__ void __launch_bounds__(WORKERS + 128, 1) persistent(const __grid_constant__ Args a) {
  Task* const tasks = shared<Task>(AT_TASKS);
  int* const lens = shared<int>(AT_LENS);
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < STAGES; i++)
      init_barrier(full_barrier(i), 1), init_barrier(empty_barrier(i), WARPS * (ALL_ARRIVE ? 32 : 1));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    lens[8] = load_status(a.status), lens[9] = 0;
  }
  if (threadIdx.x < ROWS) {
    u32 first = threadIdx.x;
    while (SEVERAL && follows(a, first)) first--;
    lens[threadIdx.x] = a.seq_len[first], lens[12 + threadIdx.x] = threadIdx.x - first + 1;
  }
  const Four* const from = reinterpret_cast<const Four*>(a.tasks + (u64)blockIdx.x * NUM_TASKS);
  for (u32 i = threadIdx.x; i < NUM_TASKS * sizeof(Task) / 16; i += WORKERS)
    if (threadIdx.x < WORKERS) reinterpret_cast<Four*>(tasks)[i] = from[i];
  const u32 step = a.steps[blockIdx.x] + 1;
  __syncthreads();
  if (lens[8]) return;  // an earlier step failed
  if (threadIdx.x >= WORKERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(EXPERTS ? 56 : 40));
    if (threadIdx.x < WORKERS + 32 * COPIERS) copy_tasks(a, tasks, step);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(EXPERTS ? 224 : 232));
    run_tasks(a, tasks, step);
  }
}
