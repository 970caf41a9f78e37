// Products of one or a few rows in bf16 with packed weights, which stream through shared memory.
//
//   y = silu_mul(rms_norm(x) · weightᵀ + bias) + residual, and the same for a token's experts
//
// A program stays on its multiprocessor and takes one tile of 16 weight rows after the other. One
// warp copies: the copy unit fills a ring of STAGES, each with SEGMENT bytes of the tile's rows, and
// goes on to the next tile. The ring is full before the kernel that makes x has ended, so memory is
// not idle while kernels wait for each other. Eight warps share the depth: each multiplies 64 bytes
// of every row of a stage, and they add their sums in shared memory, in their order.
//
// Instructions, not bytes, would decide the time if each code became a number in bf16. So codes are
// multiplied as they are, in one of two ways.
//
// For one or a few rows integers are the left operand of the matrix units in 8 bits: codes of 4 bits
// take an `and`, those of 8 bits nothing. Each 128 or 64 columns of x are integers of 16 bits,
// relative to their largest magnitude, and their two bytes are two columns of the right operand,
// which has eight. So sums of a chunk are exact, and x is rounded to 2⁻¹⁶ of the largest.
//
// With HALVES the operands are fp16: the bits of an integer are a number that is not normal, code ·
// 2⁻²⁴, and codes in fp8 become fp16 by an instruction for two. A chunk of x times a power of two
// fits fp16, which has more digits than bf16.
//
// Constants, by -D: BITS (4 or 8), FP8 (codes are float8_e4m3fn), OFFSET, SCALE (0 fp32, 1 bf16,
// 2 fp16), HALVES (always for FP8), TILES (of eight rows of x), DEPTH, GROUP_SHIFT and ROWS_SHIFT (a
// scale is for so many columns and weight rows, as powers of two), NUM_GROUPS, STAGES, SLOTS (scales
// of tiles on their way), MIN_PROGRAMS (of a multiprocessor), SINGLE (one row of x), AT_ONCE (rows of
// x that are read together), SILU, NORM (x is normed first), PAIRS (0 a product, 1 a product for each
// of a token's experts, 2 the sum over them), TOP_K (experts of a token), PDL.
//
// t thread of four | g group of four threads: the weight row in a half of a tile, and the column of
// the right operand

#include "packed_codes.cuh"

struct __align__(8) Two { u32 a, b; };

struct __align__(64) Map { u64 words[16]; };  // CUtensorMap

struct Args {
  Map code_map;          // [(E ·) O, D · BITS / 8] bytes in boxes of 8 rows and SEGMENT bytes, in lines of 128
  const u16* x;          // [T, D] bf16
  const u8* scale;       // [(E,) R, G]
  const u8* offset;      // [(E,) O, G]
  const u16* norm;       // [D]
  const u16* bias;       // [O]
  const u16* residual;   // [T, num_outs]
  const int* expert;     // [K]
  const float* factor;   // [K]
  u16* out;              // [T, num_outs], or [K, num_outs]
  u64 x_stride;
  u32 num_rows;          // of x
  u32 num_outs;
  u32 num_tiles, tiles_each;  // of all experts, and of one
  float eps;
};

#define WARPS 8
#define WORKERS (32 * WARPS)
#define SEGMENT 512                            // bytes of a weight row in a stage
#define BOX_BYTES (8 * SEGMENT)                // a half of a tile
#define STAGE_BYTES (2 * BOX_BYTES)
#define ROW_BYTES (DEPTH * BITS / 8)
#define STEPS ((ROW_BYTES + SEGMENT - 1) / SEGMENT)
#define CHUNK (512 / BITS)                     // columns of a warp in a stage
#define NUM_CHUNKS (DEPTH / CHUNK)
#define DIGITS (HALVES ? 1 : 2)                // columns of the right operand that make a row of x
#define X_SIZE (HALVES ? 2 : 1)                // bytes of a digit
#define EACH (CHUNK / 4 * X_SIZE)              // bytes of x of a thread
#define XS (EACH / 16)
#define LARGEST 32639.0f                       // integer of 16 bits whose digits have a sign
#define SCALE_BYTES (SCALE == 0 ? 4 : 2)
#define SCALE_ROWS (ROWS_SHIFT ? 1 : 8)        // of a half of a tile
#define HALF_BYTES (SCALE_ROWS * NUM_GROUPS * SCALE_BYTES)
// A half's scales may begin between the multiples of 16 bytes that are copied.
#define IS_SHIFTED (HALF_BYTES % 16 != 0)
#define HALF_SIZE (IS_SHIFTED ? (HALF_BYTES + 30) / 16 * 16 : HALF_BYTES)
#define SLOT_BYTES ((OFFSET ? 4 : 2) * HALF_SIZE + (IS_SHIFTED ? 16 : 0))
#define BARRIER_BYTES ((2 * STAGES + 2 * SLOTS + 1) / 2 * 16)
#define X_PIECES (DEPTH / 8)
#define X_PITCH (DEPTH * X_SIZE + 16)
#define PARTS (PAIRS == 2 ? TOP_K : 1)         // products that a tile adds
#define MINE ((X_PIECES + WORKERS - 1) / WORKERS)  // pieces of a row that a thread stores
#define OUTS (SILU ? 8 : 16)                   // of a tile, for each row of x
#define UNROLLED 2
#define MAX_TOKENS (8 * TILES)

__device__ __forceinline__ void copy_box(const Map* map, u32 to, u32 barrier, u32 line, u32 row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(line), "r"(row)
      : "memory");
}

// Where the copy unit puts a piece of 16 bytes of a row of a box: it exchanges those of a line of 128
// bytes by the number of the line in the box, so that rows g and g + 1 are in different banks.
__device__ __forceinline__ u32 place_of_code(u32 row, u32 piece) {
  const u32 line = row * (SEGMENT / 128) + piece / 8;
  return line * 128 + ((piece ^ line) & 7) * 16;
}

// The number of a scale of a half of a tile, of a thread's columns.
__device__ __forceinline__ float own_scale(const u8* half, int g, u32 column) {
  const u32 idx = (ROWS_SHIFT ? 0 : g * NUM_GROUPS) + (column >> GROUP_SHIFT);
#if SCALE == 0
  return reinterpret_cast<const float*>(half)[idx];
#else
  return scale_of_bits(reinterpret_cast<const u16*>(half)[idx]);
#endif
}

__device__ __forceinline__ u32 weight_row(const Args& a, u32 tile, u32 row) {
#if SILU
  return tile * 8 + (row & 7) + (row < 8 ? 0 : a.num_outs);
#else
  return tile * 16 + row;
#endif
}

// The tiles of a program, one after the other.
struct Tiles {
  u32 tile, expert;         // of its expert; of a product, of all
  u32 all;                  // its number in all experts
};

__device__ __forceinline__ void find(const Args& a, Tiles& u) {
#if PAIRS == 1
  u.tile = u.all % a.tiles_each, u.expert = u.all < a.num_tiles ? a.expert[u.all / a.tiles_each] : 0;
#else
  u.tile = u.all, u.expert = 0;
#endif
}

__device__ __forceinline__ bool is_over(const Args& a, const Tiles& u) {
  return u.all >= a.num_tiles;
}

__device__ __forceinline__ Tiles first_tile(const Args& a) {
  Tiles u = {};
  u.all = blockIdx.x;
  find(a, u);
  return u;
}

__device__ __forceinline__ void advance(const Args& a, Tiles& u) {
  u.all += gridDim.x;
  find(a, u);
}

// Copies a part of a tile.
__device__ __forceinline__ void copy_part(const Args& a, u32 tile, u32 expert, u32 ring, u8* slots,
                                          u32 barriers, Ring& stage, Ring& slot) {
  const u32 full = barriers, empty = full + 8 * STAGES;
  const u32 slot_full = empty + 8 * STAGES, slot_empty = slot_full + 8 * SLOTS;
  const u32 num_lines = SILU ? 2 * a.num_outs : a.num_outs;
  const u32 first_scale = expert * (((num_lines - 1) >> ROWS_SHIFT) + 1);
  wait_for(slot_empty + 8 * slot.at, slot.parity);
  u8* const to = slots + slot.at * SLOT_BYTES;
  u64 at[2];
  u32 shift[2] = {0, 0}, size[2] = {HALF_BYTES, HALF_BYTES};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const u32 row = first_scale + (weight_row(a, tile, 8 * h) >> ROWS_SHIFT);
    at[h] = (u64)row * (NUM_GROUPS * SCALE_BYTES);
    if (IS_SHIFTED) {
      shift[h] = at[h] % 16, size[h] = (shift[h] + HALF_BYTES + 15) / 16 * 16;
      *reinterpret_cast<u32*>(to + SLOT_BYTES - 16 + 4 * h) = shift[h];
    }
  }
  expect(slot_full + 8 * slot.at, (OFFSET ? 2 : 1) * (size[0] + size[1]));
#pragma unroll
  for (int i = 0; i < (OFFSET ? 4 : 2); i++)
    copy(shared_address(to) + i * HALF_SIZE,
         (i < 2 ? a.scale : a.offset) + (at[i & 1] - shift[i & 1]), size[i & 1],
         slot_full + 8 * slot.at);
  slot.advance(SLOTS);
  const u32 first_row = expert * num_lines;
  const u32 rows[2] = {first_row + weight_row(a, tile, 0), first_row + weight_row(a, tile, 8)};
  for (u32 step = 0; step < STEPS; step++) {
    const u32 barrier = full + 8 * stage.at, box = ring + stage.at * STAGE_BYTES;
    wait_for(empty + 8 * stage.at, stage.parity);
    expect(barrier, STAGE_BYTES);
#pragma unroll
    for (int h = 0; h < 2; h++)
      copy_box(&a.code_map, box + h * BOX_BYTES, barrier, step * (SEGMENT / 128), rows[h]);
    stage.advance(STAGES);
  }
}

// Copies all tiles of this program, by one thread. `ring` and `slots` are the places of codes and
// scales.
__device__ __forceinline__ void produce(const Args& a, u32 ring, u8* slots, u32 barriers) {
  Ring stage, slot;
  stage.parity = slot.parity = 1;  // a first pass finds every place empty
  if (PAIRS) wait_for_earlier_kernels();  // that choose the experts
  for (Tiles u = first_tile(a); !is_over(a, u); advance(a, u))
    for (u32 part = 0; part < PARTS; part++)
      copy_part(a, u.tile, PAIRS == 2 ? a.expert[part] : u.expert, ring, slots, barriers, stage, slot);
}

__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

// acc += left · right of 32 columns, unsigned by signed bytes.
__device__ __forceinline__ void multiply_bytes(int (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                               u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// acc += left · right of 16 columns in fp16.
__device__ __forceinline__ void multiply_halves(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3,
                                                u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 of_fp8(u32 two) {  // two codes in fp16
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)two));
  return r;
}

__device__ __forceinline__ u32 in_fp16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Of a column of the right operand in a chunk: what its sums are multiplied by, and the sum of x.
struct __align__(8) Column { float scale, sum; };

// Where x is in shared memory: rows of digits, and the columns of chunks.
struct X {
  u8* digits;
  Column* columns;
  u32 each;  // columns of a chunk
};

// Where a piece of 16 bytes of x is: threads t that read 64 bytes each would meet in banks.
__device__ __forceinline__ u32 place_of_x(u32 piece) {
  return EACH == 64 ? piece ^ (piece >> 2 & 2) : piece;
}

// Stores 8 numbers of a row of x. Neighbouring threads have the others of their chunk.
__device__ __forceinline__ void store_piece(const X& to, const float (&v)[8], u32 row, u32 piece) {
  const bool is_real = piece < X_PIECES;
  u32 most = 0;  // the bits of numbers without sign have their order, and NaN is the largest
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 bits = __float_as_uint(v[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
    sum += v[i];
  }
#pragma unroll
  for (int i = 1; i < CHUNK / 8; i *= 2) {
    const u32 other = __float_as_uint(__shfl_xor_sync(0xffffffff, __uint_as_float(most), i));
    most = other > most ? other : most;
    if (OFFSET) sum += __shfl_xor_sync(0xffffffff, sum, i);
  }
  u8* const row_at = to.digits + row * (DIGITS * X_PITCH);
#if HALVES
  // the largest is made 2¹⁴ to 2¹⁵
  const u32 exponent = most >> 23 < 20 ? 20 : most >> 23;
  const bool is_upper = !FP8 && BITS == 4 && piece & 2;  // with codes times 16
  const float by = __uint_as_float((exponent > 254 ? 1 : 268 - exponent - (is_upper ? 4 : 0)) << 23);
  const float scale =
      __uint_as_float(exponent > 254 ? 0x7fc00000 : exponent - 14 << 23) * (FP8 ? 1 : 0x1p24f);
  // the columns of a word's bytes 0 and 2, then of bytes 1 and 3; in fp8 in their order
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int first = FP8 ? 2 * i : i / 2 * 4 + i % 2;
    w[i] = in_fp16(v[first] * by, v[first + (FP8 ? 1 : 2)] * by);
  }
  if (is_real)
    *reinterpret_cast<Four*>(row_at + place_of_x(piece) * 16) = Four{w[0], w[1], w[2], w[3]};
#else
  most = most < 0x0da24260 ? 0x0da24260 : most;  // 1e-30
  const float largest = __uint_as_float(most), by = __fdividef(LARGEST, largest);
  const float scale = largest * (1 / LARGEST / (BITS == 4 ? 16 : 1));
  u32 low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 w[4];  // 0x8080 + an integer, in the lower two bytes
#pragma unroll
    for (int j = 0; j < 4; j++)
      w[j] = __float_as_uint(fmaf(v[4 * i + j], by, 12582912.0f + 0x8080));
    const u32 p = __byte_perm(w[0], w[1], 0x5140), q = __byte_perm(w[2], w[3], 0x5140);
    low[i] = __byte_perm(p, q, 0x5410) ^ 0x80808080;
    high[i] = __byte_perm(p, q, 0x7632) ^ 0x80808080;
  }
  if (is_real) {
    *reinterpret_cast<Two*>(row_at + piece * 8) = Two{low[0], low[1]};
    *reinterpret_cast<Two*>(row_at + X_PITCH + piece * 8) = Two{high[0], high[1]};
  }
#endif
  if (is_real && piece % (CHUNK / 8) == 0) {
    const u32 chunk = piece / (CHUNK / 8);
    Column* const column = to.columns + (PAIRS == 2 ? (row * NUM_CHUNKS + chunk) * to.each
                                                    : chunk * to.each + row * DIGITS);
    column[0] = Column{scale, sum};
    if (DIGITS == 2) column[1] = Column{scale * 256, 0};
  }
}


// Stores a row of x, times the norm's weight.
__device__ __forceinline__ void store_row(const X& to, const Four (&x)[MINE],
                                          const Four (&weight)[NORM ? MINE : 1], u32 row,
                                          float* squares) {
  float square = 0;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    float v[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 word = word_of(x[i], j);
      v[2 * j] = low_of(word), v[2 * j + 1] = high_of(word);
#if NORM
      square += v[2 * j] * v[2 * j] + v[2 * j + 1] * v[2 * j + 1];
      v[2 * j] *= low_of(word_of(weight[i], j)), v[2 * j + 1] *= high_of(word_of(weight[i], j));
#endif
    }
    store_piece(to, v, row, threadIdx.x + i * WORKERS);
  }
#if NORM
#pragma unroll
  for (int i = 16; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32 * MAX_TOKENS + row] = square;
#endif
}

// Loads rows of x from `first` on.
__device__ __forceinline__ void load_rows(const Args& a, Four (&x)[AT_ONCE][MINE], u32 first) {
#pragma unroll
  for (int r = 0; r < AT_ONCE; r++) {
    const u64 at = first + r < a.num_rows ? (first + r) * a.x_stride : 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const u32 piece = threadIdx.x + i * WORKERS;
      const bool is_real = piece < X_PIECES && first + r < a.num_rows;
      x[r][i] = is_real ? load_four(a.x + at + piece * 8) : Four{0, 0, 0, 0};
    }
  }
}

// Reads rows of x, when the kernel that makes it has ended. With NORM x is multiplied by the norm's
// weight here, and `squares` [WARPS, rows] has the sums of squares.
__device__ __forceinline__ void read_x(const Args& a, const X& to, float* squares) {
  Four weight[NORM ? MINE : 1];
#if NORM
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const u32 piece = threadIdx.x + i * WORKERS;
    weight[i] = piece < X_PIECES ? load_four(a.norm + piece * 8) : Four{0, 0, 0, 0};
  }
#endif
  wait_for_earlier_kernels();
  Four x[2][AT_ONCE][MINE];  // those that are stored, and the next ones
  load_rows(a, x[0], 0);
#if SINGLE
  store_row(to, x[0][0], weight, 0, squares);
#else
  for (u32 first = 0; first < a.num_rows; first += 2 * AT_ONCE)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const u32 now = first + k * AT_ONCE;
      load_rows(a, x[1 - k], now + AT_ONCE);
#pragma unroll
      for (int r = 0; r < AT_ONCE; r++)
        if (now + r < a.num_rows) store_row(to, x[k][r], weight, now + r, squares);
    }
#endif
  meet();
}

// An output that a thread finishes, of a weight row of a tile and a row of x.
struct Out {
  u32 row, token, out;
};

__device__ __forceinline__ Out out_of(u32 tile, u32 idx) {
  return Out{idx % OUTS, idx / OUTS, tile * OUTS + idx % OUTS};
}

// The sum over warps for a weight row of a tile.
__device__ __forceinline__ float sum_of(const float* sums, u32 row, u32 token) {
  const u32 column = token * DIGITS, lane = row % 8 * 4 + column % 8 / 2;
  const float* const at = sums + (column / 8 * 32 + lane) * 4 + row / 8 * 2 + column % 2;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < WARPS; k++) {
    sum += at[k * TILES * 128];
    if (DIGITS == 2) sum += at[k * TILES * 128 + 1];
  }
  return sum;
}

__device__ __forceinline__ void finish(const Args& a, const float* sums, const float* squares,
                                       const Out& o, float residual, u64 out_row) {
  float factor = 1;
#if NORM
  float square = 0;
#pragma unroll
  for (int k = 0; k < WARPS; k++) square += squares[k * MAX_TOKENS + o.token];
  factor = rsqrtf(square / DEPTH + a.eps);
#endif
  float y = sum_of(sums, o.row, o.token) * factor;
  if (a.bias) y += of_bf16(a.bias[o.out]);
  y = rounded(y);
#if SILU
  float up = sum_of(sums, o.row + 8, o.token) * factor;
  if (a.bias) up += of_bf16(a.bias[o.out + a.num_outs]);
  y = rounded(__fdividef(y, 1.0f + __expf(-y))) * rounded(up);
#endif
  if (a.residual) y = rounded(y) + residual;
  a.out[out_row * a.num_outs + o.out] = to_bf16(y);
}

// Adds the sums of a chunk: of its codes of a thread's two weight rows, and its columns of x, which
// are [TILES][XS] pieces of 16 bytes at `digits`.
__device__ __forceinline__ void add_chunk(float (&total)[TILES][4], const Four (&code)[2],
                                          const u8* digits, const Column* columns,
                                          u32 num_columns, int g, int t, const float (&scale)[2],
                                          const float (&offset)[2]) {
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    Four right[XS];
#pragma unroll
    for (int i = 0; i < XS; i++) {
      const int at = EACH == 64 ? i ^ (t & 2) : i;  // as place_of_x
      right[i] = 8 * n + g < num_columns ? load_four(digits + n * (8 * X_PITCH) + 16 * at)
                                         : Four{0, 0, 0, 0};
    }
#if HALVES
    float sums[2][4] = {};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const u32 p = word_of(code[0], w), q = word_of(code[1], w);
      const Four& one = right[w / 2];
      const u32 b0 = word_of(one, 2 * (w & 1)), b1 = word_of(one, 2 * (w & 1) + 1);
#if FP8
      multiply_halves(sums[w & 1], of_fp8(p), of_fp8(q), of_fp8(p >> 16), of_fp8(q >> 16), b0, b1);
#elif BITS == 8
      multiply_halves(sums[w & 1], spread(p, 0x4240), spread(q, 0x4240), spread(p, 0x4341),
                      spread(q, 0x4341), b0, b1);
#else
      const Four& two = right[2 + w / 2];  // of the upper halves of bytes
      multiply_halves(sums[0], p & 0x000f000f, q & 0x000f000f, p >> 8 & 0x000f000f,
                      q >> 8 & 0x000f000f, b0, b1);
      multiply_halves(sums[1], p & 0x00f000f0, q & 0x00f000f0, p >> 8 & 0x00f000f0,
                      q >> 8 & 0x00f000f0, word_of(two, 2 * (w & 1)), word_of(two, 2 * (w & 1) + 1));
#endif
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[0][i] += sums[1][i];
#else
    int sums[2][4] = {};  // of codes, or of the lower half of bytes and of 16 · the upper half
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      const u32 p = word_of(code[0], w), q = word_of(code[1], w);
      const u32 r = word_of(code[0], w + 1), s = word_of(code[1], w + 1);
      const Four &one = right[0], &two = right[XS - 1];
#if BITS == 4
      multiply_bytes(sums[0], p & 0x0f0f0f0f, q & 0x0f0f0f0f, r & 0x0f0f0f0f, s & 0x0f0f0f0f,
                     word_of(one, w), word_of(one, w + 1));
      multiply_bytes(sums[1], p & 0xf0f0f0f0, q & 0xf0f0f0f0, r & 0xf0f0f0f0, s & 0xf0f0f0f0,
                     word_of(two, w), word_of(two, w + 1));
#else
      multiply_bytes(sums[0], p, q, r, s, word_of(one, w), word_of(one, w + 1));
#endif
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (BITS == 4) sums[0][i] = sums[0][i] * 16 + sums[1][i];
#endif
    const float4 mine = *reinterpret_cast<const float4*>(columns + 8 * n);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      total[n][i] += (float)sums[0][i] * (scale[i / 2] * (i & 1 ? mine.z : mine.x));
      if (OFFSET) total[n][i] += offset[i / 2] * (i & 1 ? mine.w : mine.y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, MIN_PROGRAMS) packed_stream(
    const __grid_constant__ Args a) {
  extern __shared__ u8 unaligned[];
  u8* const shared = unaligned + (-shared_address(unaligned) & 1023u);
  // the ring | scales | barriers | sums of two tiles | squares | columns of chunks | digits of x
  u8* const slots = shared + STAGES * STAGE_BYTES;
  u8* const after = slots + SLOTS * SLOT_BYTES;
  float4* const parts = reinterpret_cast<float4*>(after + BARRIER_BYTES);
  float* const squares = reinterpret_cast<float*>(parts + 2 * TILES * WORKERS);
  X x_at;
  x_at.columns = reinterpret_cast<Column*>(squares + WARPS * MAX_TOKENS);
  x_at.each = PAIRS ? 2 : (a.num_rows * DIGITS + 1) / 2 * 2;
  // a thread without a column reads behind those of its chunk
  x_at.digits = reinterpret_cast<u8*>(
      x_at.columns + (PAIRS == 2 ? TOP_K : 1) * NUM_CHUNKS * x_at.each + 8);
  const u32 full = shared_address(after), empty = full + 8 * STAGES;
  const u32 slot_full = empty + 8 * STAGES, slot_empty = slot_full + 8 * SLOTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, WARPS);
    for (int i = 0; i < SLOTS; i++)
      init_barrier(slot_full + 8 * i, 1), init_barrier(slot_empty + 8 * i, WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (warp == WARPS) {
    if (lane == 0) produce(a, shared_address(shared), slots, full);
    return;
  }

  read_x(a, x_at, squares);
  const u32 num_tokens = PAIRS ? 1 : a.num_rows, num_columns = num_tokens * DIGITS;
  Ring stage, slot;
  u32 count = 0;
  for (Tiles u = first_tile(a); !is_over(a, u); advance(a, u), count++) {
    const u32 idx = (threadIdx.x - count % WARPS * 32) % WORKERS;  // the warps take turns
    float residual = 0;
    if (a.residual && idx < OUTS * num_tokens) {
      const Out o = out_of(u.tile, idx);
      residual = of_bf16(a.residual[(u64)o.token * a.num_outs + o.out]);
    }
    float total[TILES][4] = {};
#pragma unroll 1
    for (u32 part = 0; part < PARTS; part++) {
#if PAIRS == 2
      const float factor = a.factor[part];
#endif
      const u8* const digits = x_at.digits + (part * DIGITS + g) * X_PITCH + t * EACH;
      const Column* const columns = x_at.columns + part * NUM_CHUNKS * x_at.each + 2 * t;
      wait_for(slot_full + 8 * slot.at, slot.parity);
      const u8* scales[OFFSET ? 4 : 2];
#pragma unroll
      for (int i = 0; i < (OFFSET ? 4 : 2); i++) {
        scales[i] = slots + slot.at * SLOT_BYTES + i * HALF_SIZE;
        if (IS_SHIFTED)
          scales[i] += *reinterpret_cast<const u32*>(slots + (slot.at + 1) * SLOT_BYTES - 16 +
                                                     4 * (i & 1));
      }
      float acc[TILES][4] = {};
#pragma unroll UNROLLED
      for (u32 step = 0; step < STEPS; step++) {
        const u32 chunk = step * WARPS + warp;
        const bool is_real = NUM_CHUNKS % WARPS == 0 || chunk < NUM_CHUNKS;
        const u32 at = is_real ? chunk : 0;
        float scale[2], offset[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          scale[h] = own_scale(scales[h], g, at * CHUNK);
          offset[h] = OFFSET ? own_scale(scales[OFFSET ? 2 + h : 0], g, at * CHUNK) : 0;
        }
        wait_for(full + 8 * stage.at, stage.parity);
        const u8* const codes = shared + stage.at * STAGE_BYTES + place_of_code(g, warp * 4 + t);
        const Four code[2] = {load_four(codes), load_four(codes + BOX_BYTES)};
        __syncwarp();
        if (lane == 0) arrive(empty + 8 * stage.at);
        stage.advance(STAGES);
        if (is_real)
          add_chunk(acc, code, digits + at * (CHUNK * X_SIZE), columns + at * x_at.each,
                    num_columns, g, t, scale, offset);
      }
      __syncwarp();
      if (lane == 0) arrive(slot_empty + 8 * slot.at);
      slot.advance(SLOTS);
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#if PAIRS == 2
          total[n][i] += factor * acc[n][i];
#else
          total[n][i] = acc[n][i];
#endif
    }

    float4* const sums = parts + (count & 1) * (TILES * WORKERS);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      sums[(warp * TILES + n) * 32 + lane] =
          make_float4(total[n][0], total[n][1], total[n][2], total[n][3]);
    meet();
    if (idx < OUTS * num_tokens) {  // at most one for each thread
      const Out o = out_of(u.tile, idx);
      u64 out_row = o.token;
#if PAIRS == 1
      out_row += u.all / a.tiles_each;
#endif
      finish(a, reinterpret_cast<const float*>(sums), squares, o, residual, out_row);
    }
  }
}
