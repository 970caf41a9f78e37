// What the kernels of packed weights share: codes as numbers, rounding, barriers of shared memory.
//
// Constants: BITS (4 or 8), FP8 (codes are float8_e4m3fn), E2M1 (codes are numbers in e2m1), OFFSET,
// SCALE (0 fp32, 1 bf16, 2 fp16), PDL.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#ifndef FP8
#define FP8 0
#endif
#ifndef E2M1
#define E2M1 0
#endif

struct __align__(16) Four { u32 a, b, c, d; };

__device__ __forceinline__ Four load_four(const void* at) {
  return *reinterpret_cast<const Four*>(at);
}

__device__ __forceinline__ u32 word_of(const Four& v, int w) {
  return w == 0 ? v.a : w == 1 ? v.b : w == 2 ? v.c : v.d;
}

__device__ __forceinline__ float of_bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u32 to_bf16(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ float rounded(float v) { return of_bf16(to_bf16(v)); }

__device__ __forceinline__ u32 twice(float v) {  // v in both halves
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ u32 spread(u32 word, u32 selector) {
  return __byte_perm(word, 0, selector);
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ void multiply(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float scale_of_bits(u16 bits) {
#if SCALE == 1
  return of_bf16(bits);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
#endif
}

__device__ __forceinline__ float load_scale(const u8* at, u32 idx) {
#if SCALE == 0
  return __ldg(reinterpret_cast<const float*>(at) + idx);
#else
  return scale_of_bits(__ldg(reinterpret_cast<const u16*>(at) + idx));
#endif
}

// The codes of a word as numbers in bf16, in pairs. The bits of a code are a denormal number or one
// of the smallest normal numbers, code · 2⁻¹³³ or, for upper codes, 2⁻¹²⁹. `low` and `high` are the
// scale times 2¹¹³ and 2¹⁰⁹, `less` is the offset times 2⁻²⁰, and sums are multiplied by 2²⁰.
// Numbers in fp8 are exact, and without their scales. In e2m1 the three bits of a magnitude are the
// last of a bf16 exponent and the first of its fraction, the number times 2⁻¹²⁶; `low` is the scale
// times 2¹⁰⁶.
struct Pairs { u32 of[8 / (BITS / 4) / 2]; };

__device__ __forceinline__ Pairs numbers(u32 word, u32 low, u32 high, u32 less) {
  Pairs r;
#if FP8
  u32 p = spread(word, 0x1404), q = spread(word, 0x3424);
  u32 m = ((p >> 4) & 0x07f007f0) | (p & 0x80008000);
  u32 n = ((q >> 4) & 0x07f007f0) | (q & 0x80008000);
  r.of[0] = fma2(m, 0x7b807b80, 0x80008000);
  r.of[1] = fma2(n, 0x7b807b80, 0x80008000);
#elif E2M1
  u32 p = spread(word, 0x4140), q = spread(word, 0x4342);
  r.of[0] = fma2((p << 6 & 0x01c001c0) | (p << 12 & 0x80008000), low, less);
  r.of[1] = fma2((q << 6 & 0x01c001c0) | (q << 12 & 0x80008000), low, less);
  r.of[2] = fma2((p << 2 & 0x01c001c0) | (p << 8 & 0x80008000), low, less);
  r.of[3] = fma2((q << 2 & 0x01c001c0) | (q << 8 & 0x80008000), low, less);
#elif BITS == 8
  r.of[0] = fma2(spread(word, 0x4140), low, less);
  r.of[1] = fma2(spread(word, 0x4342), low, less);
#else
  u32 p = spread(word, 0x4140), q = spread(word, 0x4342);
  r.of[0] = fma2(p & 0x000f000f, low, less);
  r.of[1] = fma2(q & 0x000f000f, low, less);
  r.of[2] = fma2(p & 0x00f000f0, high, less);
  r.of[3] = fma2(q & 0x00f000f0, high, less);
#endif
  return r;
}

// The arguments of `numbers` for a scale and an offset.
__device__ __forceinline__ void factors(float scale, float offset, u32& low, u32& high, u32& less) {
  low = FP8 ? 0 : twice(scale * (E2M1 ? 0x1p106f : 0x1p113f));
  high = FP8 || E2M1 || BITS == 8 ? 0 : twice(scale * 0x1p109f);
  less = OFFSET ? twice(offset * 0x1p-20f) : 0x80008000;
}

__device__ __forceinline__ u32 shared_address(const void* at) {
  return (u32)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
