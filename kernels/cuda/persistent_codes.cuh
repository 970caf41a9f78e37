// Weights of persistent.cu as numbers in bf16: those in fp8, and integers of 4 bits.

// What a thread reads of a weight row's piece: eight numbers.
template <u32 CODE> struct Eight { using Type = Four; };
template <> struct Eight<OF_FP8> { using Type = uint2; };
template <> struct Eight<OF_INT4> { using Type = u32; };

__device__ __forceinline__ void load(Four& to, const u8* at) { to = load_four(at); }
__device__ __forceinline__ void load(uint2& to, const u8* at) { to = *reinterpret_cast<const uint2*>(at); }
// Of integers the four pieces of a group; zeros where there is none.
__device__ __forceinline__ void load_group(u32* to, const u8* at, bool is_there) {
  const Four v = is_there ? load_four(at) : Four{0, 0, 0, 0};
  to[0] = v.a, to[1] = v.b, to[2] = v.c, to[3] = v.d;
}

// Eight numbers in bf16 without their scale: of fp8 their bits are those of a small bf16, whose exponent is
// 120 less, and integers are times 2⁻²⁰ (packed_codes.cuh).
__device__ __forceinline__ Four in_bf16(const Four& v) { return v; }
__device__ __forceinline__ u32 pair_of_fp8(u32 two) {
  return fma2((two >> 4 & 0x07f007f0) | (two & 0x80008000), 0x7b807b80, 0x80008000);
}
__device__ __forceinline__ Four in_bf16(const uint2& v) {
  return Four{pair_of_fp8(spread(v.x, 0x1404)), pair_of_fp8(spread(v.x, 0x3424)),
              pair_of_fp8(spread(v.y, 0x1404)), pair_of_fp8(spread(v.y, 0x3424))};
}

__device__ __forceinline__ Four in_bf16(const u32& v) {
  const Pairs r = numbers(v, 0x78007800, 0x76007600, 0x80008000);
  return Four{r.of[0], r.of[1], r.of[2], r.of[3]};
}

__device__ __forceinline__ float scale_at(const u16* scales, u32 idx) {
  return load_scale(reinterpret_cast<const u8*>(scales), idx);
}

// The first weight rows of a tile's halves.
template <u32 FLAGS>
__device__ __forceinline__ u32 lower_row(u32 tile) { return FLAGS & (SILU | HALF) ? tile * 8 : tile * 16; }
template <u32 FLAGS>
__device__ __forceinline__ u32 upper_row(u32 tile, u32 num_outs) {
  return lower_row<FLAGS>(tile) + (FLAGS & SILU ? num_outs : 8);
}

// A thread's part of a stage: of the weight rows g and, unless it is a half tile, g + 8. With blocks their
// scales, and of integers those of the groups of each four pieces.
template <class P>
struct Piece {
  static constexpr u32 UPPER = P::IS_HALF ? 1 : P::TURNS, GROUPS = P::IS_INT4 ? P::TURNS / 4 : 1;
  typename P::Codes lower[P::TURNS], upper[UPPER];
  float scale[P::HAS_BLOCKS ? P::TURNS : 1], upper_scale[P::HAS_BLOCKS ? UPPER : 1];
  u16 group_scale[2][GROUPS], group_offset[2][OFFSET ? GROUPS : 1];
};
