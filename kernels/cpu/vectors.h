// What all C++ kernels share: vectors of floats, the 16-bit types, buffers and threads. Plain C++
// over raw pointers and compiler vector extensions. There are no torch headers, which would take
// most of the compile time, and intrinsics of one architecture always have a fallback.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// ----------------------------------------------------------------------------------------- vectors
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
constexpr int kLanes = LANES;
// 32 vector registers hold an 8 x 3 tile of accumulators, 16 hold a 4 x 3 one
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));
typedef float VecAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IVecAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HVecAt __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
enum Dtype : int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

// x - 0 costs nothing, but the compiler would keep the addition in 0 + x, because 0 + -0 is 0
INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Vec load(const float* p) { return *(const VecAt*)p; }
INLINE void store(float* p, Vec v) { *(VecAt*)p = v; }
INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// a * b + c, rounded once where the machine can. Compilers choose that for some copies of a loop
// and not for others (GCC for Zen: not for a single sum), and then the bits of a sum would differ.
INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// g++ converts between vectors of different widths one element at a time; with 512 bits there are
// instructions
INLINE Vec load(const Bf16* p) {
#if LANES == 16
  return (Vec)((UVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#else
  return (Vec)(__builtin_convertvector((HVec) * (const HVecAt*)p, UVec) << 16);
#endif
}

INLINE Vec load(const Fp16* p) {
#if LANES == 16
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif LANES == 8 && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // after the shift the exponent is 112 too small; the product corrects it, also for subnormals
  UVec h = __builtin_convertvector((HVec) * (const HVecAt*)p, UVec);
  UVec sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  Vec finite = (Vec)magnitude * splat(0x1p112f);
  UVec not_finite = (UVec)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Vec)((UVec)finite | not_finite | sign);
#endif
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(Bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
INLINE float to_float(Fp16 x) {
  Fp16 lanes[kLanes] = {x};
  return load(lanes)[0];
}

INLINE void put(float* p, float x) { *p = x; }
INLINE void put(Bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE void put(Fp16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) half = 0x7e00;
  else if (magnitude >= 0x477ff000u) half = 0x7c00;  // rounds to 65536 or above
  else if (magnitude < 0x38800000u) {
    // subnormal: adding 0.5 makes the hardware round at bit 2^-24
    float positive;
    std::memcpy(&positive, &magnitude, 4);
    positive += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &positive, 4);
    half = rounded - 0x3f000000u;
  } else half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  p->bits = (uint16_t)(sign | half);
}

// swaps v[i] and v[i ^ Step]; Step is a power of two
template <int Step>
INLINE Vec swap(Vec v) {
#if defined(__clang__)
#define SWAP4(i) (i) ^ Step, (i + 1) ^ Step, (i + 2) ^ Step, (i + 3) ^ Step
#if LANES == 16
  return __builtin_shufflevector(v, v, SWAP4(0), SWAP4(4), SWAP4(8), SWAP4(12));
#elif LANES == 8
  return __builtin_shufflevector(v, v, SWAP4(0), SWAP4(4));
#else
  return __builtin_shufflevector(v, v, SWAP4(0));
#endif
#else
  IVec index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ Step;
  return __builtin_shuffle(v, index);
#endif
}

// v rounded to bf16, in the upper halves of its bits
#if defined(__AVX512BF16__) && LANES == 16
#define ROUNDS_BF16  // one instruction, which treats numbers below 2^-126 as zero
INLINE UVec bf16_bits(Vec v) {
  return (UVec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)) << 16;
}
#else
INLINE UVec bf16_bits(Vec v) {
  UVec bits = (UVec)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  UVec is_nan = (UVec)(v != v);
  return (rounded & ~is_nan) | (is_nan & 0x7fc00000u);
}
#endif
INLINE void store(Bf16* p, Vec v) {
#ifdef ROUNDS_BF16
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)(bf16_bits(v) >> 16)));
#else
  *(HVecAt*)p = __builtin_convertvector(bf16_bits(v) >> 16, HVec);
#endif
}
INLINE void store(Fp16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) put(p + i, v[i]);
}

// v rounded as by a store as T
template <typename T>
INLINE Vec rounded_to(Vec v) {
  if constexpr (std::is_same_v<T, float>) return v;
  if constexpr (std::is_same_v<T, Bf16>) return (Vec)bf16_bits(v);
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

// loads the first n numbers at p, then zeros; stores the first n
template <typename T>
INLINE Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T>
INLINE void store_first(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

INLINE float sum(Vec v) {
  if constexpr (kLanes >= 16) v += swap<8>(v);
  if constexpr (kLanes >= 8) v += swap<4>(v);
  v += swap<2>(v);
  v += swap<1>(v);
  return v[0];
}

// to[i] = sum of the i-th, in the same order of additions
INLINE void store_sums(float* to, Vec a, Vec b, Vec c, Vec d) {
#if LANES == 16
  const __m512 first = (__m512)((Vec)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) +
                                (Vec)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee));
  const __m512 second = (__m512)((Vec)_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x44) +
                                 (Vec)_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xee));
  Vec all = (Vec)_mm512_shuffle_f32x4(first, second, 0x88) +
            (Vec)_mm512_shuffle_f32x4(first, second, 0xdd);  // each has four lanes
  all += swap<2>(all);
  all += swap<1>(all);
  const __m512i lanes = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(lanes, (__m512)all)));
#else
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

INLINE float max_of(Vec v) {
  if constexpr (kLanes >= 16) v = vmax(v, swap<8>(v));
  if constexpr (kLanes >= 8) v = vmax(v, swap<4>(v));
  v = vmax(v, swap<2>(v));
  v = vmax(v, swap<1>(v));
  return v[0];
}

// 2^x, with x clamped to the exponents of normal numbers. x = n + f with |f| <= 1/2; 2^f is a
// Taylor polynomial (relative error about 1e-7), 2^n is built from its bits.
INLINE Vec exp2(Vec x) {
  x = vmax(x, splat(-126.0f));
  x = x < 127.0f ? x : splat(127.0f);
  Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are round(x)
  Vec f = x - (shifted - 12582912.0f);
  Vec p = splat(1.5403530e-4f);
  for (float next : {1.33335581e-3f, 9.61812910e-3f, 5.55041086e-2f, 2.40226506e-1f, 6.93147180e-1f,
                     1.0f})
    p = multiply_add(p, f, splat(next));
  return (Vec)((IVec)p + ((IVec)shifted << 23));
}

// x / (1 + e^-x), rounded as by a store as T
template <typename T>
INLINE Vec silu(Vec x) {
  return rounded_to<T>(x / (1.0f + exp2(x * -1.4426950408889634f)));
}

template <typename F>
INLINE void with_dtype(int64_t dtype, F&& f) {
  if (dtype == kFp32) f(float{});
  else if (dtype == kBf16) f(Bf16{});
  else f(Fp16{});
}

// ----------------------------------------------------------------------------------------- threads

// Buffers that a thread keeps between calls: kOwn for its own use, kShared for data that it
// writes and other threads read. Buffers with different names are others.
enum Use { kOwn, kShared };

template <Use use = kOwn, typename Name = void>
float* scratch(size_t num_floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < num_floats) {
    std::free(buffer.data);
    size_t num_bytes = (num_floats * 4 + 63) / 64 * 64;
    buffer.data = (float*)std::aligned_alloc(64, num_bytes);
    buffer.size = num_bytes / 4;
  }
  return buffer.data;
}

// One thread does less work than this (in elements accessed) before another thread wakes.
constexpr int64_t kMinParallel = 1 << 15;

// Runs a loop on threads: see threads.h, whose function kernels.cpp lends to the other libraries.
typedef void (*Loop)(int64_t num_items, int64_t num_threads, void (*run)(const void*, int64_t),
                     const void* work);
Loop loop_on_lent_threads = nullptr;

// Calls work(item) for every item below num_items. A free thread takes the next item.
template <typename Work>
void parallel_for(int64_t num_items, int64_t num_threads, const Work& work) {
  num_threads = std::min(num_threads, num_items);
  if (num_threads > 1) {
    loop_on_lent_threads(
        num_items, num_threads,
        [](const void* work, int64_t item) { (*(const Work*)work)(item); }, &work);
    return;
  }
  for (int64_t item = 0; item < num_items; ++item) work(item);
}

}  // namespace

extern "C" void nanovllm_use_loop(Loop loop) { loop_on_lent_threads = loop; }
