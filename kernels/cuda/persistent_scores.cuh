// Scores of a stage's keys with all queries, of persistent.cu. Up to four queries: SHARING threads have a
// key, and their part of each query in registers. More would not fit there: two warps multiply 16 keys
// each by all queries, which are columns of the matrix units.

// Numbers of a head for thread l of so many that share it: as many from 64 on as from 0.
template <int THREADS>
struct Numbers {
  static constexpr int EACH = HEAD / THREADS;
  float of[EACH];

  __device__ static __forceinline__ int place(int l, int i) {
    return (i < EACH / 2 ? 0 : HEAD / 2 - EACH / 2) + l * (EACH / 2) + i;
  }
};

template <int THREADS>
__device__ __forceinline__ Numbers<THREADS> load_numbers(const void* head, int l) {
  using N = Numbers<THREADS>;
  N r;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 words[N::EACH / 4];
    const u16* const from = static_cast<const u16*>(head) + N::place(l, h * N::EACH / 2);
    if (N::EACH == 16)
      *reinterpret_cast<Four*>(words) = load_four(from);
    else
      *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(from);
#pragma unroll
    for (int i = 0; i < N::EACH / 4; i++) {
      const int at = h * N::EACH / 2 + 2 * i;
      r.of[at] = low_of(words[i]), r.of[at + 1] = high_of(words[i]);
    }
  }
  return r;
}

#if GROUP <= 4

#define SHARING 8          // threads that share a key
#define IS_SCALED true     // the queries in shared memory are

struct Queries { Numbers<SHARING> of[GROUP]; };

__device__ __forceinline__ Queries load_queries(const Worker& w) {
  Queries q;
#pragma unroll
  for (int i = 0; i < GROUP; i++)
#pragma unroll
    for (int j = 0; j < Numbers<SHARING>::EACH; j += 4) {
      const u32 at = i * HEAD + Numbers<SHARING>::place(threadIdx.x % SHARING, j);
      const float4 v = *shared<float4>(AT_QUERIES + at * 4);
      q.of[i].of[j] = v.x, q.of[i].of[j + 1] = v.y, q.of[i].of[j + 2] = v.z, q.of[i].of[j + 3] = v.w;
    }
  return q;
}

__device__ __forceinline__ void score_keys(const Worker& w, const Queries& q, const u8* keys, u32 num, float* scores) {
  const u32 l = threadIdx.x % SHARING, key = threadIdx.x / SHARING;
  const Numbers<SHARING> k = load_numbers<SHARING>(keys + (key < num ? key : 0) * (HEAD * 2), l);
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float score = 0;
#pragma unroll
    for (int j = 0; j < Numbers<SHARING>::EACH; j++) score += q.of[i].of[j] * k.of[j];
#pragma unroll
    for (int j = SHARING / 2; j; j /= 2) score += __shfl_xor_sync(0xffffffff, score, j);
    if (l == 0) scores[i * TOKENS + key] = key < num ? score : NO_SCORE;
  }
}

#else

#define IS_SCALED false

// Thread t of group g has those columns of query g that it has of a key.
struct Queries { Four of[HEAD / 32]; };

__device__ __forceinline__ Queries load_queries(const Worker& w) {
  Queries q;
  const float4* const from = shared<float4>(AT_QUERIES + (w.lane / 4 * HEAD + w.lane % 4 * 8) * 4);
#pragma unroll
  for (int i = 0; i < HEAD / 32; i++) {
    q.of[i] = Four{0, 0, 0, 0};
    if (w.lane / 4 >= GROUP) continue;
    const float4 low = from[i * 8], high = from[i * 8 + 1];
    q.of[i] = Four{to_bf16_pair(low.x, low.y), to_bf16_pair(low.z, low.w), to_bf16_pair(high.x, high.y),
                   to_bf16_pair(high.z, high.w)};
  }
  return q;
}

__device__ __forceinline__ void score_keys(const Worker& w, const Queries& q, const u8* keys, u32 num,
                                           float* scores) {
  if (w.warp >= TOKENS / 16) return;
  const u32 key = w.warp * 16 + w.lane / 4;
  const u8* const from = keys + key * (HEAD * 2) + w.lane % 4 * 16;
  float acc[2][4] = {};
#pragma unroll
  for (int i = 0; i < HEAD / 32; i++) {
    const Four low = load_four(from + i * 64), high = load_four(from + 8 * (HEAD * 2) + i * 64);
    multiply(acc[0], low.a, high.a, low.b, high.b, q.of[i].a, q.of[i].b);
    multiply(acc[1], low.c, high.c, low.d, high.d, q.of[i].c, q.of[i].d);
  }
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    const u32 own = key + i / 2 * 8, query = w.lane % 4 * 2 + i % 2;
    if (query < GROUP)
      scores[query * TOKENS + own] = own < num ? (acc[0][i] + acc[1][i]) * w.a.scale : NO_SCORE;
  }
}

#endif
