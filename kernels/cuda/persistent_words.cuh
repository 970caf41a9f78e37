// Words, through which tasks of persistent.cu exchange results, and what a thread has while it computes.
// Those of 64 bits have 32 bits of data, those of 128 bits have 96, and both a tag.

struct __align__(16) Pair { u32 a, a_tag, b, b_tag; };  // two words
struct __align__(16) Wide { float a, b, c; u32 tag; };

__device__ __forceinline__ Pair load_words(const u64* at) {
  u64 a, b;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at));
  return Pair{(u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32)};
}

__device__ __forceinline__ void store_word(u64* at, u32 value, u32 tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"((u64)tag << 32 | value) : "memory");
}

__device__ __forceinline__ Wide load_wide(const u64* at) {
  u64 a, b;
  asm volatile("{ .reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v; }"
               : "=l"(a), "=l"(b)
               : "l"(at));
  return Wide{__uint_as_float((u32)a), __uint_as_float((u32)(a >> 32)), __uint_as_float((u32)b),
              (u32)(b >> 32)};
}

__device__ __forceinline__ void store_wide(u64* at, const Wide& v) {
  const u64 a = (u64)__float_as_uint(v.b) << 32 | __float_as_uint(v.a);
  const u64 b = (u64)v.tag << 32 | __float_as_uint(v.c);
  asm volatile("{ .reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v; }" ::"l"(at),
               "l"(a), "l"(b)
               : "memory");
}

__device__ __forceinline__ void load(Pair& to, const u64* at) { to = load_words(at); }
__device__ __forceinline__ void load(Wide& to, const u64* at) { to = load_wide(at); }

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
  const Task* task;    // in shared memory
  u32 task_idx, base;  // the tag of phase 0
  u32 polls_left;
  Ring stage;
  u32 turn;            // of the two places for sums
  int warp, lane;
};

// 0 if all words have the tag.
__device__ __forceinline__ u32 difference(const Pair& v, u32 tag) {
  return v.a_tag ^ tag | v.b_tag ^ tag;
}
__device__ __forceinline__ u32 difference(const Wide& v, u32 tag) { return v.tag ^ tag; }

// After POLLS polls in vain. False if all are used up: then the words are what they are.
__device__ __forceinline__ bool may_poll(Worker& w, u32 phase) {
  if (w.polls_left == 0) return false;
  w.polls_left = load_status(w.a.status) || w.polls_left <= POLLS ? 0 : w.polls_left - POLLS;
  if (w.polls_left == 0 && claim(w.a.status)) {
    u32* const status = w.a.status;
    status[1] = blockIdx.x, status[2] = w.task_idx, status[3] = phase, status[4] = threadIdx.x;
  }
  return true;
}

// Waits for those of N pairs of words, or wide words, of a phase for which `is_read(i)`; `at(i)` is the
// place of i. All loads are on their way at the same time, since each takes as long as a result's whole
// way.
template <class Word, int N, class IsRead, class At>
__device__ __forceinline__ void fetch(Worker& w, Word (&v)[N], u32 phase, IsRead is_read, At at) {
  const u32 tag = w.base + phase;
  volatile int* const is_waiting = shared<volatile int>(AT_LENS) + 9;
  if (threadIdx.x == 0) *is_waiting = 1;
  u32 missing;
  do {
#pragma unroll 1
    for (u32 polls = 0; polls < POLLS; polls++) {
#pragma unroll
      for (int i = 0; i < N; i++)
        if (is_read(i)) load(v[i], at(i));
      missing = 0;
#pragma unroll
      for (int i = 0; i < N; i++)
        if (is_read(i)) missing |= difference(v[i], tag);
      if (!missing) break;
      rest();
    }
  } while (missing && may_poll(w, phase));
  if (threadIdx.x == 0) *is_waiting = 0;
}

__device__ __forceinline__ void note(const Worker& w, int which) {
#if CLOCKS
  if (threadIdx.x == 0)
    w.a.clocks[((u64)blockIdx.x * NUM_TASKS + w.task_idx) * TIMES + which] = now();
#endif
}
