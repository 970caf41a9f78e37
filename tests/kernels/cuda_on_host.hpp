// Runs a kernel in CUDA C++ on a CPU: a fiber for each thread of all programs, in one thread. A fiber
// runs until it waits for others or looks whether a result is there, and the next one goes on.
// Barriers, copies, warps' exchanges and matrix products are done by lists of fibers and loops.
//
// What follows a line "// in place of NAME" replaces the device function of that name, which holds
// instructions of a GPU.
#include <setjmp.h>
#include <ucontext.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define rsqrtf(x) (1.0f / sqrtf(x))
#define __expf expf
#define __fdividef(a, b) ((a) / (b))

struct Index { unsigned x = 0, y = 0, z = 0; };
static Index threadIdx, blockIdx, gridDim;
struct uint2 { unsigned x, y; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Program;
struct Fiber {
  Program* program;
  Index thread, block;
  std::unique_ptr<char[]> stack;
  ucontext_t begin;  // until it has run; changes of `ucontext` take system calls
  jmp_buf at;
  bool has_begun = false, has_ended = false;
};
static std::deque<Fiber*> ready;
static Fiber* current;
static jmp_buf next;  // runs the next fiber

static void leave() {
  if (_setjmp(current->at) == 0) _longjmp(next, 1);
}
static void yield() {
  ready.push_back(current);
  leave();
}

// Fibers that wait for something.
struct Waiting {
  std::vector<Fiber*> fibers;
  void wait() {
    fibers.push_back(current);
    leave();
  }
  void wake() {
    for (Fiber* one : std::exchange(fibers, {})) ready.push_back(one);
  }
};

struct Meeting {
  int num_fibers, num_here = 0;
  Waiting here = {};
  void arrive_and_wait() {
    if (++num_here < num_fibers) return here.wait();
    num_here = 0;
    here.wake();
  }
};

struct Barrier {
  int num_arrivals, num_missing;
  long num_bytes;
  unsigned phase;
};

struct Program {
  alignas(1024) unsigned char shared[256 << 10];
  Meeting all_threads, all_workers;
  std::vector<Meeting> warps;
  float exchanged[32][32];
  unsigned operands[32][32][6];
  std::map<unsigned, Barrier> barriers_at;
  Waiting change;
};
static Program* own;
#define all_shared (own->shared)
#define dynamic_shared (own->shared + 16)  // not aligned to more
static int warp() { return threadIdx.x / 32; }
static int lane() { return threadIdx.x % 32; }
static void __syncthreads() { own->all_threads.arrive_and_wait(); }
static void __syncwarp() { own->warps[warp()].arrive_and_wait(); }

static float __shfl_xor_sync(unsigned, float v, int mask) {
  own->exchanged[warp()][lane()] = v;
  __syncwarp();
  const float r = own->exchanged[warp()][lane() ^ mask];
  __syncwarp();
  return r;
}

static float __shfl_sync(unsigned, float v, int from) {
  own->exchanged[warp()][lane()] = v;
  __syncwarp();
  const float r = own->exchanged[warp()][from];
  __syncwarp();
  return r;
}

static float __uint_as_float(unsigned v) { float r; memcpy(&r, &v, 4); return r; }
static unsigned __float_as_uint(float v) { unsigned r; memcpy(&r, &v, 4); return r; }
template <class T> static T __ldg(const T* at) { return *at; }

static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

static unsigned bits_of_bf16(float v) {
  unsigned r;
  memcpy(&r, &v, 4);
  return (r + 0x7fff + (r >> 16 & 1)) >> 16;
}
static float half_of(unsigned word, int upper) {
  return __uint_as_float(upper ? word & 0xffff0000 : word << 16);
}

static void change(unsigned barrier, int num_arrivals, long num_bytes) {
  Barrier& b = own->barriers_at.at(barrier);
  b.num_missing -= num_arrivals, b.num_bytes += num_bytes;
  if (b.num_missing == 0 && b.num_bytes == 0) {
    b.phase++, b.num_missing = b.num_arrivals;
    own->change.wake();
  }
}

// in place of to_bf16_pair
static unsigned to_bf16_pair(float low, float high) { return bits_of_bf16(low) | bits_of_bf16(high) << 16; }
// in place of twice
static unsigned twice(float v) { return bits_of_bf16(v) * 0x10001; }
// in place of fma2
static unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned r[2];
  for (int i = 0; i < 2; i++)
    r[i] = bits_of_bf16((double)half_of(a, i) * half_of(b, i) + half_of(c, i));
  return r[0] | r[1] << 16;
}
// in place of multiply
static void multiply(float (&acc)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                     unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(own->operands[warp()][lane()], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned left = own->operands[warp()][row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
      const unsigned right = own->operands[warp()][column * 4 + k % 8 / 2][4 + k / 8];
      acc[i] += half_of(left, k % 2) * half_of(right, k % 2);
    }
  }
  __syncwarp();
}
// in place of multiply_bytes
static void multiply_bytes(int (&acc)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(own->operands[warp()][lane()], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 32; k++) {
      const unsigned left = own->operands[warp()][row % 8 * 4 + k % 16 / 4][k / 16 * 2 + row / 8];
      const unsigned right = own->operands[warp()][column * 4 + k % 16 / 4][4 + k / 16];
      acc[i] += (int)(left >> k % 4 * 8 & 255) * (signed char)(right >> k % 4 * 8 & 255);
    }
  }
  __syncwarp();
}
// in place of multiply_halves
static void multiply_halves(float (&acc)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                            unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(own->operands[warp()][lane()], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      _Float16 left, right;
      const unsigned* const mine_too = own->operands[warp()][column * 4 + k % 8 / 2];
      memcpy(&left, (char*)&own->operands[warp()][row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8] + k % 2 * 2, 2);
      memcpy(&right, (char*)&mine_too[4 + k / 8] + k % 2 * 2, 2);
      acc[i] += (float)left * (float)right;
    }
  }
  __syncwarp();
}
// in place of of_fp8
static unsigned of_fp8(unsigned two) {
  unsigned r = 0;
  for (int i = 0; i < 2; i++) {
    const unsigned code = two >> 8 * i & 255, exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? ldexpf(8 + mantissa, (int)exponent - 10) : ldexpf(mantissa, -9);
    const _Float16 v = code & 128 ? -size : size;
    u16 bits;
    memcpy(&bits, &v, 2);
    r |= (unsigned)bits << 16 * i;
  }
  return r;
}
// in place of in_fp16
static unsigned in_fp16(float low, float high) {
  const _Float16 v[2] = {(_Float16)low, (_Float16)high};
  unsigned r;
  memcpy(&r, v, 4);
  return r;
}
// in place of scale_of_bits
static float scale_of_bits(u16 bits) {
  if (SCALE == 1) return of_bf16(bits);
  _Float16 r;
  memcpy(&r, &bits, 2);
  return r;
}
// in place of shared_address
static unsigned shared_address(const void* at) { return (const unsigned char*)at - all_shared; }
// in place of init_barrier
static void init_barrier(unsigned barrier, unsigned num_arrivals) {
  own->barriers_at[barrier] = {(int)num_arrivals, (int)num_arrivals, 0, 0};
}
// in place of arrive
static void arrive(unsigned barrier) { change(barrier, 1, 0); }
// in place of expect
static void expect(unsigned barrier, unsigned num_bytes) { change(barrier, 1, num_bytes); }
// in place of wait_for
static void wait_for(unsigned barrier, unsigned parity) {
  while ((own->barriers_at.at(barrier).phase & 1) == parity) own->change.wait();
}
// in place of is_done
static bool is_done(unsigned barrier, unsigned parity) {
  yield();
  return (own->barriers_at.at(barrier).phase & 1) != parity;
}
// in place of wait_for_earlier_kernels
static void wait_for_earlier_kernels() {}
// in place of most_of_warp
static u32 most_of_warp(u32 v) {
  unsigned* const all = own->operands[warp()][0];
  all[lane() * 6] = v;
  __syncwarp();
  u32 most = 0;
  for (int i = 0; i < 32; i++) most = all[i * 6] > most ? all[i * 6] : most;
  __syncwarp();
  return most;
}
// in place of meet
static void meet() { own->all_workers.arrive_and_wait(); }
// in place of copy
static void copy(unsigned to, const u8* from, unsigned num_bytes, unsigned barrier) {
  if (num_bytes % 16 || to % 16 || (size_t)from % 16) abort();
  memcpy(all_shared + to, from, num_bytes);
  change(barrier, 0, -(long)num_bytes);
}
// in place of copy_piece
static void copy_piece(u8* to, const void* from, u32 num_bytes) {
  memset(to, 0, 16);
  memcpy(to, from, num_bytes);
}
// in place of load_once
static Four load_once(const void* at) { return load_four(at); }
// in place of copy_box
static void copy_box(const Map* map, unsigned to, unsigned barrier, unsigned line, unsigned row) {
  // the map has the address, the bytes of a row and the number of rows
  const u8* const from = (const u8*)map->words[0];
  const unsigned num_lines = map->words[1] / 128, per_row = SEGMENT / 128;
  if (to % 1024) abort();
  for (unsigned i = 0; i < 8 * per_row; i++)
    for (unsigned piece = 0; piece < 8; piece++) {
      const unsigned r = row + i / per_row, l = line + i % per_row, at = to + i * 128;
      u8* const target = all_shared + at + (piece ^ (at >> 7 & 7)) * 16;
      if (l < num_lines && r < map->words[2])
        memcpy(target, from + r * map->words[1] + l * 128 + piece * 16, 16);
      else
        memset(target, 0, 16);
    }
  change(barrier, 0, -(long)BOX_BYTES);
}
// in place of load_words
static Pair load_words(const u64* at) {
  yield();
  return Pair{(u32)at[0], (u32)(at[0] >> 32), (u32)at[1], (u32)(at[1] >> 32)};
}
// in place of store_word
static void store_word(u64* at, u32 value, u32 tag) { *at = (u64)tag << 32 | value; }
// in place of load_wide
static Wide load_wide(const u64* at) {
  yield();
  Wide r;
  memcpy(&r, at, sizeof r);
  return r;
}
// in place of store_wide
static void store_wide(u64* at, const Wide& from) { memcpy(at, &from, 16); }
// in place of claim
static bool claim(u32* at) { return std::exchange(*at, 1) == 0; }
// in place of load_status
static u32 load_status(const u32* at) {
  yield();
  return *at;
}
// in place of now
static u64 now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
// in place of rest
static void rest() { yield(); }
// the end
#ifndef WORKERS  // of a kernel without a warp that copies
#define WORKERS (THREADS - 32)
#endif
#ifndef COPIERS
#define COPIERS 1
#endif
#define ALL_THREADS (WORKERS + 32 * COPIERS)
static Args arguments;
static void run_fiber() {
  KERNEL(arguments);
  current->has_ended = true;
  _longjmp(next, 1);
}

// Runs fibers until none can go on.
static void run_ready() {
  _setjmp(next);
  if (ready.empty()) return;
  current = ready.front();
  ready.pop_front();
  own = current->program, threadIdx = current->thread, blockIdx = current->block;
  if (std::exchange(current->has_begun, true)) _longjmp(current->at, 1);
  setcontext(&current->begin);
}

extern "C" int run(const void* given, unsigned num_bytes, unsigned num_programs, unsigned num_rows) {
  constexpr size_t kStackBytes = 256 << 10;
  if (num_bytes != sizeof arguments) return 1;
  memcpy(&arguments, given, sizeof arguments);
  gridDim.x = num_programs;
  for (unsigned row = 0; row < num_rows; row++) {
    std::vector<std::unique_ptr<Program>> programs;
    std::deque<Fiber> fibers;
    for (unsigned program = 0; program < num_programs; program++) {
      Program& p = *programs.emplace_back(std::make_unique<Program>());
      memset(p.shared, 0x7f, sizeof p.shared);
      p.all_threads.num_fibers = ALL_THREADS, p.all_workers.num_fibers = WORKERS;
      p.warps.assign(ALL_THREADS / 32, Meeting{32});
      for (unsigned i = 0; i < ALL_THREADS; i++) {
        Fiber& fiber = fibers.emplace_back();
        fiber.program = &p, fiber.thread.x = i, fiber.block.x = program, fiber.block.y = row;
        fiber.stack.reset(new char[kStackBytes]);
        getcontext(&fiber.begin);
        fiber.begin.uc_stack.ss_sp = fiber.stack.get(), fiber.begin.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.begin, run_fiber, 0);
        ready.push_back(&fiber);
      }
    }
    run_ready();
    for (const Fiber& one : fibers)
      if (!one.has_ended) return 2;  // it waits for ever
  }
  return 0;
}
