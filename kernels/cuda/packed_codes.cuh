// What the kernels of packed weights share: codes as numbers.
//
// Constants: BITS (4 or 8), FP8 (codes are float8_e4m3fn), E2M1 (codes are numbers in e2m1), OFFSET,
// SCALE (0 fp32, 1 bf16, 2 fp16), PDL.

#include "device.cuh"

#ifndef FP8
#define FP8 0
#endif
#ifndef E2M1
#define E2M1 0
#endif

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
// A multiplication puts both the sign and the magnitude of a nibble in their places: it is not one
// of the operations on bits, of which there are more than of others.
__device__ __forceinline__ u32 of_nibbles(u32 nibbles, u32 places) {
  return nibbles * places & 0x81c081c0;
}

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
  r.of[0] = fma2(of_nibbles(p & 0x000f000f, 0x1040), low, less);
  r.of[1] = fma2(of_nibbles(q & 0x000f000f, 0x1040), low, less);
  r.of[2] = fma2(of_nibbles(p & 0x00f000f0, 0x0104), low, less);
  r.of[3] = fma2(of_nibbles(q & 0x00f000f0, 0x0104), low, less);
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

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
