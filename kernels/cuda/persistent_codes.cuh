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

__device__ __forceinline__ u32 bits_of_scale(const u16* scales, u32 idx) {
  return SCALE ? __ldg(scales + idx) : __ldg(reinterpret_cast<const u32*>(scales) + idx);
}

// The scale whose bits another thread of the warp has.
__device__ __forceinline__ float of_thread(u32 bits, u32 thread) {
  const float r = __shfl_sync(0xffffffff, __uint_as_float(bits), thread);
  return SCALE ? scale_of_bits(__float_as_uint(r)) : r;
}

// The first weight rows of a tile's halves.
template <u32 FLAGS>
__device__ __forceinline__ u32 lower_row(u32 tile) { return FLAGS & (SILU | HALF) ? tile * 8 : tile * 16; }
template <u32 FLAGS>
__device__ __forceinline__ u32 upper_row(u32 tile, u32 num_outs) {
  return lower_row<FLAGS>(tile) + (FLAGS & SILU ? num_outs : 8);
}

// A thread's part of a stage: of the weight rows g and, unless it is a half tile, g + 8.
template <class P>
struct Piece {
  typename P::Codes lower[P::TURNS], upper[P::IS_HALF ? 1 : P::TURNS];
};

// The scales of a chunk's columns in AT_ONCE tiles: of blocks, or of groups with their offsets. The thread
// 4 g + t has those of tile t: of the blocks of pieces g, g + 8 and so on, or of a warp's own group of the
// rows g and g + 8. They are loaded while the chunk before is computed with.
template <class P, u32 FLAGS>
struct Scales {
  static constexpr bool HAS = P::HAS_BLOCKS || P::IS_INT4, HAS_OFFSET = P::IS_INT4 && OFFSET;
  static constexpr u32 HALVES = P::IS_HALF ? 1 : 2, NUM = P::IS_INT4 ? P::PIECES / 4 : (P::PIECES + 7) / 8;
  static_assert(AT_ONCE == 4, "four threads of a group have a tile each");
  u32 scale[HALVES][NUM], offset[HALVES][HAS_OFFSET ? NUM : 1];  // their bits: a conversion would wait

  __device__ __forceinline__ void load(const Worker& w, const Task& t, u32 chunk, u32 first) {
    const u32 own = first + w.lane % 4, tile = own < t.first + t.count ? own : first;
#pragma unroll
    for (u32 i = 0; i < HALVES * NUM && HAS; i++) {
      const bool upper = i / NUM;
      const u32 row = upper ? upper_row<FLAGS>(tile, t.num_outs) : lower_row<FLAGS>(tile);
      const u32 column = column_of(w, chunk, i % NUM);
      const u32 at = P::IS_INT4 ? group(w, row, column) : block(tile, row, column, upper);
      scale[upper][i % NUM] = bits_of_scale(t.k_norm, at);
      if (HAS_OFFSET) offset[upper][i % NUM] = bits_of_scale(t.q_norm, at);
    }
  }

  // Of a tile, the number of a piece, and the half of its rows.
  __device__ __forceinline__ float of(const Worker& w, u32 tile, u32 piece, bool upper) const {
    return of_thread(scale[upper][P::IS_INT4 ? piece / 4 : piece / 8], thread(w, tile, piece));
  }
  __device__ __forceinline__ float offset_of(const Worker& w, u32 tile, u32 piece, bool upper) const {
    return of_thread(offset[upper][HAS_OFFSET ? piece / 4 : 0], thread(w, tile, piece));
  }

 private:
  __device__ __forceinline__ u32 thread(const Worker& w, u32 tile, u32 piece) const {
    return (P::IS_INT4 ? w.lane / 4 : piece % 8) * 4 + tile;
  }

  // Where the columns of the i-th scale begin.
  __device__ __forceinline__ u32 column_of(const Worker& w, u32 chunk, u32 i) const {
    const u32 piece = P::IS_INT4 ? 4 * i : 8 * i + w.lane / 4;
    if (piece >= P::PIECES || !P::has(chunk, piece, w.warp)) return 0;
    return chunk * P::CHUNK + piece * WORKERS + (P::IS_INT4 ? w.warp * GROUP_COLUMNS : w.warp * 32);
  }

  __device__ __forceinline__ u32 group(const Worker& w, u32 row, u32 column) const {
    return (row + w.lane / 4) * (P::WIDTH / GROUP_COLUMNS) + column / GROUP_COLUMNS;
  }

  __device__ __forceinline__ u32 block(u32 tile, u32 row, u32 column, bool upper) const {
    constexpr u32 SIDE = BLOCK ? BLOCK : 1;
    if (EXPERTS && FLAGS & EXPERT) return expert_block<FLAGS>(tile, column, upper);
    return row / SIDE * ((P::WIDTH + SIDE - 1) / SIDE) + column / SIDE;
  }
};

// What offsets of integers are multiplied by: sums of rows 2t and 2t + 1 of x over each of a warp's groups.
template <class P>
struct GroupSums {
  static constexpr bool HAS = P::IS_INT4 && OFFSET;
  float of[HAS ? P::PIECES / 4 : 1][2];

  __device__ __forceinline__ void add_up(const Four (&x)[P::PIECES]) {
    constexpr u32 ONES = 0x3f803f80;
#pragma unroll
    for (u32 group = 0; group < P::PIECES / 4 && HAS; group++) {
      float sum[4] = {};
#pragma unroll
      for (u32 i = 4 * group; i < 4 * group + 4; i++) {
        multiply(sum, ONES, 0, ONES, 0, x[i].a, x[i].b);
        multiply(sum, ONES, 0, ONES, 0, x[i].c, x[i].d);
      }
      of[group][0] = sum[0] * 0x1p-20f, of[group][1] = sum[1] * 0x1p-20f;
    }
  }
};
