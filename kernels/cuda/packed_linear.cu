// Products of up to 64 rows in bf16 with packed weights, on the matrix units (mma.sync, sm_80 on).
//
//   y = silu_mul(rms_norm(x) · weightᵀ + bias) + residual, and the same for pairs of experts
//
// A warp multiplies M · 16 weight rows by all rows of x. Four threads share a weight row: each reads
// 16 bytes of its codes, which are 32 or 16 neighbouring columns, and the same columns of x. The sum
// may be in any order, so no code moves between threads: a word becomes the left operand of one or
// two products of the matrix units in registers. WK warps share the depth and add their sums in
// shared memory, in their order. STAGES chunks of codes of a warp are on their way.
//
// Constants, by -D: BITS (4 or 8), FP8 (codes are float8_e4m3fn), E2M1 (numbers in e2m1), OFFSET,
// SCALE (0 fp32, 1 bf16, 2 fp16), NT (tiles of 8 rows of x), M, WK, WR, STAGES,
// MIN_PROGRAMS (of a multiprocessor), SILU, NORM (x is normed first: 1 one row, 2 up to 8),
// CLAMP (SILU is a clamped SwiGLU), PAIRS (0 a product, 1 a product for each pair, 2 the sum over a
// token's pairs, 3 a product for up to 8 · NT pairs of one expert), TOP_K (pairs of a token, if PAIRS
// is 2), X_BY_PLACE and OUT_BY_PLACE (if PAIRS is 3: rows of x or of the result are in the order of
// sorted pairs), PDL.
//
// t thread of four | g group of four threads: the weight row in a tile of 8, and the row of x

#include "packed_codes.cuh"

struct Args {
  const u16* x;          // [T, D] bf16
  const u8* code;        // [(E,) O, D · BITS / 8]
  const u8* scale;       // [(E,) R, G]
  const u8* offset;      // [(E,) O, G]
  const u16* norm;       // [D]
  const u16* bias;       // [(E,) O]
  const u16* residual;   // [T, num_outs]
  const int* expert;     // [T, K]
  const float* factor;   // [T, K]
  const int* pair;       // [P], sorted by expert: `moe_sort.Groups`
  const int* start;      // [E + 1]
  u16* out;              // [T, num_outs]
  u64 x_stride;
  u32 num_rows;          // of x; if PAIRS is 3 the number of experts
  u32 num_lines, depth;
  u32 group_shift;       // a scale is for 2^group_shift columns
  u32 rows_shift;        // and for 2^rows_shift weight rows
  u32 num_groups, x_shared_by;
  float eps;
  float alpha, limit;    // of CLAMP
};

#define CHUNK (BITS == 4 ? 128 : 64)           // columns of a chunk
#define WORDS (CHUNK / 16)                     // products of a tile and a chunk
#define EACH (CHUNK / 4)                       // columns of a thread
#define XS (EACH / 8)                          // its pieces of 16 bytes of x
#define THREADS (32 * WK * WR)
#define SCALE_BYTES (SCALE == 0 ? 4 : 2)
#define BATCH 4                                // pieces of x of a thread that are normed at a time
#define SHARE (WK > TOP_K ? WK / TOP_K : 1)    // warps that share the depth of a pair, if PAIRS is 2

__device__ __forceinline__ Four load_once(const void* at) {
  Four v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.a), "=r"(v.b), "=r"(v.c), "=r"(v.d) : "l"(at));
  return v;
}

// Begins to copy 16 bytes to shared memory: so many of them, and then zeros.
__device__ __forceinline__ void copy_piece(u8* to, const void* from, u32 num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(num_bytes));
}

struct Slot {  // a chunk of a warp on its way
  Four code[M][2];
  float scale[M][2], offset[M][2];
};

__device__ __forceinline__ void flatten(u32 (&flat)[XS * 4], const Four (&x)[XS]) {
#pragma unroll
  for (int i = 0; i < XS * 4; i++) flat[i] = word_of(x[i / 4], i % 4);
}

// A unit's arguments of `numbers`, for the two rows of a thread.
__device__ __forceinline__ void factors(const Slot& slot, int m, u32 (&low)[2], u32 (&high)[2],
                                        u32 (&less)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++)
    factors(slot.scale[m][h], slot.offset[m][h], low[h], high[h], less[h]);
}

// The sum of the squares of eight numbers, and the numbers times a factor and a norm's weight.
__device__ __forceinline__ float squares_of(const Four& v) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    sum += low_of(word_of(v, i)) * low_of(word_of(v, i)) + high_of(word_of(v, i)) * high_of(word_of(v, i));
  return sum;
}
__device__ __forceinline__ Four scaled(const Four& v, const Four& weight, float by) {
  u32 r[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 word = word_of(v, i), times = word_of(weight, i);
    r[i] = to_bf16_pair(low_of(word) * by * low_of(times), high_of(word) * by * high_of(times));
  }
  return Four{r[0], r[1], r[2], r[3]};
}

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffff, v, i);
  return v;
}

extern "C" __global__ void __launch_bounds__(32 * WK * WR, MIN_PROGRAMS) packed_linear(const Args a) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = (threadIdx.x >> 5) / WR, side = (threadIdx.x >> 5) % WR;
  const u32 depth = a.depth, num_lines = a.num_lines;
  const u32 num_outs = SILU ? num_lines / 2 : num_lines;
  const u32 outs_of_tile = SILU ? 8 : 16, first = blockIdx.x * (WR * M * outs_of_tile);
  const u32 num_chunks = (depth + CHUNK - 1) / CHUNK;
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  // the weight rows of this thread: row g of each tile's upper and lower half
  u32 line[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 out = first + (side * M + m) * outs_of_tile + g + (SILU ? 0 : 8 * h);
      out = out < num_outs ? out : num_outs - 1;
      line[m][h] = out + (SILU && h ? num_outs : 0);
    }

  const u32 row_bytes = depth * BITS / 8;
  const u64 expert_bytes = (u64)num_lines * row_bytes;
  const u64 num_scales = (u64)(((num_lines - 1) >> a.rows_shift) + 1) * a.num_groups;
  const u8* code_at[M][2];
  u32 scale_at[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      code_at[m][h] = a.code + (u64)line[m][h] * row_bytes;
      scale_at[m][h] = (line[m][h] >> a.rows_shift) * a.num_groups;
    }
#if PAIRS == 2
  // of the token blockIdx.y a warp takes whole pairs, or every SHARE-th chunk of a pair
  const u32 first_pair = warp / SHARE, part = warp % SHARE, step_pairs = WK / SHARE;
  const u32 my_pairs = TOP_K > first_pair ? (TOP_K - first_pair + step_pairs - 1) / step_pairs : 0;
  const u32 my_chunks = num_chunks > part ? (num_chunks - part + SHARE - 1) / SHARE : 1;
  const u32 num_steps = num_chunks > part ? my_pairs * my_chunks : 0;
#else
  const u32 num_steps = num_chunks > (u32)warp ? (num_chunks - warp + WK - 1) / WK : 0;
#endif
  u64 expert = 0;
#if PAIRS
#if PDL
  asm volatile("griddepcontrol.wait;");
#endif
#endif
#if PAIRS == 1
  expert = a.expert[blockIdx.y];
#elif PAIRS == 3
  // Tiles of expert e begin at start[e] / (8 · NT) + e, so there is room for those of all earlier ones.
  float num_begun = 0;
  for (u32 e = lane; e < a.num_rows; e += 32)
    num_begun += (u32)a.start[e] / (8 * NT) + e <= blockIdx.y;
#pragma unroll
  for (int i = 16; i; i /= 2) num_begun += __shfl_xor_sync(0xffffffff, num_begun, i);
  expert = (u32)num_begun - 1;
  const u32 begin = a.start[expert], end = a.start[expert + 1];
  const u32 first_place = begin + (blockIdx.y - (begin / (8 * NT) + (u32)expert)) * (8 * NT);
  if (first_place >= end) return;
  auto x_row_of = [&](u32 place) {
    return X_BY_PLACE ? place : (u32)a.pair[place] / a.x_shared_by;
  };
#endif

#if PAIRS == 2
  auto pair_of = [&](u32 step) {
    return blockIdx.y * TOP_K + first_pair + step / my_chunks * step_pairs;
  };
  auto chunk_of = [&](u32 step) { return part + step % my_chunks * SHARE; };
#else
  auto chunk_of = [&](u32 step) { return warp + step * WK; };
#endif
  auto fetch = [&](Slot& slot, u32 step, int m) {
    const u32 column = chunk_of(step) * CHUNK + t * EACH;
    const bool is_real = column < depth;
    const u32 at = is_real ? column : 0;
    const u8 *scale = a.scale, *offset = a.offset;
    u64 code = at * BITS / 8;
#if PAIRS
    u64 one = expert;
#if PAIRS == 2
    one = a.expert[pair_of(step)];
#endif
    code += one * expert_bytes;
    scale += one * num_scales * SCALE_BYTES, offset += one * num_scales * SCALE_BYTES;
#endif
#pragma unroll
    for (int h = 0; h < 2; h++) {
      slot.code[m][h] = load_once(code_at[m][h] + code);
      const u32 idx = scale_at[m][h] + (at >> a.group_shift);
      slot.scale[m][h] = load_scale(scale, idx);
      if (OFFSET) slot.offset[m][h] = load_scale(offset, idx);
    }
  };

  Slot slots[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; s++)
    if ((u32)s < num_steps)
#pragma unroll
      for (int m = 0; m < M; m++) fetch(slots[s], s, m);
#if NORM
  // a row is normed by all threads, or by a warp; a batch is what a thread has in registers
  const u32 each = NORM == 1 ? THREADS * 8 : 256, batch = BATCH * each;
  const u32 first_column = (NORM == 1 ? threadIdx.x : lane) * 8;
  auto read_batch = [&](Four (&piece)[BATCH], const u16* from, u32 column) {
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      piece[i] = column + i * each < depth ? load_four(from + column + i * each) : Four{0, 0, 0, 0};
  };
  Four weight[BATCH];  // not written by the kernel before
  read_batch(weight, a.norm, first_column);
#endif
#if PDL && !PAIRS
  asm volatile("griddepcontrol.wait;");
#endif

#if NORM
  // x · norm / √(mean x² + eps), rounded to bf16, for all warps
  u16* const normed = reinterpret_cast<u16*>(shared);
  for (u32 row = NORM == 1 ? 0 : threadIdx.x >> 5; row < a.num_rows; row += THREADS / 32) {
    const u16* const from = a.x + (u64)row * a.x_stride;
    u16* const to = normed + row * (depth + 8);
    Four piece[BATCH];
    float square = 0;
    for (u32 column = first_column; column < depth; column += batch) {
      read_batch(piece, from, column);
#pragma unroll
      for (int i = 0; i < BATCH; i++) square += squares_of(piece[i]);
    }
    square = sum_of_warp(square);
#if NORM == 1
    float* const squares = reinterpret_cast<float*>(shared + ((depth * 2 + 15) & ~15u));
    if (lane == 0) squares[threadIdx.x >> 5] = square;
    __syncthreads();
    square = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) square += squares[i];
#endif
    const float factor = rsqrtf(square / depth + a.eps);
    for (u32 column = first_column; column < depth; column += batch) {
      if (depth > batch) read_batch(piece, from, column), read_batch(weight, a.norm, column);
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        if (column + i * each < depth)
          *reinterpret_cast<Four*>(to + column + i * each) = scaled(piece[i], weight[i], factor);
    }
  }
  __syncthreads();
#endif

#if NT == 1
  // columns of this thread in row g of x
#if PAIRS == 3
  const bool has_row = first_place + g < end;
  const u16* const own_x = a.x + (has_row ? x_row_of(first_place + g) * a.x_stride : 0);
#endif
  auto load_x = [&](Four (&x)[XS], u32 step) {
    const u32 column = chunk_of(step) * CHUNK + t * EACH;
    bool is_real = step < num_steps && column < depth;
#if PAIRS == 2
    is_real = is_real && g == 0;
    const u16* at = a.x + (u64)pair_of(step) * a.x_stride + column;
#elif PAIRS == 1
    is_real = is_real && g == 0;
    const u16* at = a.x + (u64)(blockIdx.y / a.x_shared_by) * a.x_stride + column;
#elif PAIRS == 3
    is_real = is_real && has_row;
    const u16* at = own_x + column;
#elif NORM
    is_real = is_real && g < a.num_rows;
    const u16* at = normed + g * (depth + 8) + column;  // rows g and g + 1 are in different banks
#else
    is_real = is_real && g < a.num_rows;
    const u16* at = a.x + (u64)g * a.x_stride + column;
#endif
#pragma unroll
    for (int i = 0; i < XS; i++) x[i] = is_real ? load_four(at + 8 * i) : Four{0, 0, 0, 0};
  };
#else
  // Warps that share a chunk of x copy it to shared memory, a step ahead: [8 · NT rows, CHUNK]. The
  // pieces of 16 bytes of a row are exchanged so that eight threads read from different banks.
#define COPIES ((8 * NT * CHUNK / 8 + 32 * WR - 1) / (32 * WR))  // of a thread
  u8* const staged = shared + warp * (8 * NT * CHUNK * 2);
#if PAIRS == 3
  const u32 num_rows = end - first_place;
  u64 x_at[COPIES];  // of the rows that this thread copies
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    const u32 row = (i * (32 * WR) + side * 32 + lane) / (CHUNK / 8);
    x_at[i] = row < num_rows ? x_row_of(first_place + row) * a.x_stride : 0;
  }
#else
  const u32 num_rows = a.num_rows;
#endif
  auto place = [](u32 row, u32 piece) {
    const u32 moved = CHUNK == 128 ? piece ^ (piece >> 3 & 1) ^ (row & 1) << 1 : piece ^ (row & 1);
    return row * (CHUNK * 2) + moved * 16;
  };
  auto copy_x = [&](u32 step) {
    u8* const to = staged + (step & 1) * (WK * 8 * NT * CHUNK * 2);
    const u32 first_column = chunk_of(step) * CHUNK;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const u32 idx = i * (32 * WR) + side * 32 + lane;
      const u32 row = idx / (CHUNK / 8), piece = idx % (CHUNK / 8), column = first_column + piece * 8;
      const bool is_real = step < num_steps && row < num_rows && column < depth;
#if PAIRS == 3
      const u16* from = is_real ? a.x + x_at[i] + column : a.x;
#else
      const u16* from = is_real ? a.x + (u64)row * a.x_stride + column : a.x;
#endif
      if (8 * NT * CHUNK / 8 % (32 * WR) == 0 || idx < 8 * NT * CHUNK / 8)
        copy_piece(to + place(row, piece), from, is_real ? 16 : 0);
    }
    asm volatile("cp.async.commit_group;");
  };
#endif

  float acc[M][NT][4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
#if PAIRS == 2
  float sums[M][4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[m][i] = 0;
#endif

#if NT == 1
  Four x[2][XS];
  load_x(x[0], 0);
#else
  copy_x(0);
#endif
  for (u32 base = 0; base < num_steps; base += STAGES) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      const u32 step = base + s;
      if (step >= num_steps) break;
      Slot& slot = slots[s];
#if NT == 1
      u32 flat[XS * 4];
      flatten(flat, x[s & 1]);
      load_x(x[(s + 1) & 1], step + 1);
#pragma unroll
      for (int m = 0; m < M; m++) {
        u32 low[2], high[2], less[2];
        factors(slot, m, low, high, less);
        float part[4] = {0, 0, 0, 0};
        float(&sum)[4] = FP8 ? part : acc[m][0];
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const Pairs p = numbers(word_of(slot.code[m][0], w), low[0], high[0], less[0]);
          const Pairs q = numbers(word_of(slot.code[m][1], w), low[1], high[1], less[1]);
#pragma unroll
          for (int i = 0; i < WORDS / 4; i++)
            multiply(sum, p.of[2 * i], q.of[2 * i], p.of[2 * i + 1], q.of[2 * i + 1],
                     flat[2 * w + 8 * i], flat[2 * w + 8 * i + 1]);
        }
        if (FP8)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[m][0][i] += part[i] * slot.scale[m][i / 2];
        if (step + STAGES < num_steps) fetch(slot, step + STAGES, m);
      }
#else
      asm volatile("cp.async.wait_group 0;");
      if (WR == 1)
        __syncwarp();
      else
        asm volatile("bar.sync %0, %1;" ::"r"(warp + 1), "n"(32 * WR) : "memory");
      copy_x(step + 1);
      const u8* const chunk = staged + (step & 1) * (WK * 8 * NT * CHUNK * 2);
      u32 operand[M][4][WORDS / 4][4];
      float scale[M][2];
#pragma unroll
      for (int m = 0; m < M; m++) {
        u32 low[2], high[2], less[2];
        factors(slot, m, low, high, less);
        scale[m][0] = slot.scale[m][0], scale[m][1] = slot.scale[m][1];
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const Pairs p = numbers(word_of(slot.code[m][0], w), low[0], high[0], less[0]);
          const Pairs q = numbers(word_of(slot.code[m][1], w), low[1], high[1], less[1]);
#pragma unroll
          for (int i = 0; i < WORDS / 4; i++) {
            operand[m][w][i][0] = p.of[2 * i], operand[m][w][i][1] = q.of[2 * i];
            operand[m][w][i][2] = p.of[2 * i + 1], operand[m][w][i][3] = q.of[2 * i + 1];
          }
        }
        if (step + STAGES < num_steps) fetch(slot, step + STAGES, m);
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        Four x[XS];
#pragma unroll
        for (int i = 0; i < XS; i++) x[i] = load_four(chunk + place(8 * n + g, XS * t + i));
        u32 flat[XS * 4];
        flatten(flat, x);
#pragma unroll
        for (int m = 0; m < M; m++) {
          float part[4] = {0, 0, 0, 0};
          float(&sum)[4] = FP8 ? part : acc[m][n];
#pragma unroll
          for (int w = 0; w < 4; w++)
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++) {
              const u32(&left)[4] = operand[m][w][i];
              multiply(sum, left[0], left[1], left[2], left[3], flat[2 * w + 8 * i],
                       flat[2 * w + 8 * i + 1]);
            }
          if (FP8)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] += part[i] * scale[m][i / 2];
        }
      }
#endif
#if PAIRS == 2
      if ((step + 1) % my_chunks == 0) {
        const float factor = a.factor[pair_of(step)];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 4; i++) sums[m][i] += factor * acc[m][0][i], acc[m][0][i] = 0;
      }
#endif
    }
#if NT == 1 && STAGES % 2
#pragma unroll
    for (int i = 0; i < XS; i++) x[0][i] = x[1][i];
#endif
  }
#if PAIRS == 2
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[m][0][i] = sums[m][i];
#endif

  // What is added to the sums of a thread is read before sums are there and results are written.
  struct Residual { u16 of[2][2]; };
  auto read_residual = [&](u32 i) {
    Residual r = {};
    if (!a.residual || i >= WR * M * NT * 32) return r;
    const u32 m = i / 32 / NT, n = i / 32 % NT, row = (i & 31) >> 2;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int h = 0; h < (SILU ? 1 : 2); h++) {
        const u32 token = 8 * n + 2 * (i & 3) + j, out = first + m * outs_of_tile + row + 8 * h;
        const bool is_real = out < num_outs && token < (PAIRS ? 1 : a.num_rows);
        if (is_real) r.of[j][h] = a.residual[(u64)(PAIRS ? blockIdx.y : token) * num_outs + out];
      }
    return r;
  };
  Residual next = read_residual(threadIdx.x);

  // the sums of all warps, in their order
  float4* const parts = reinterpret_cast<float4*>(shared);
#if NT > 1
  asm volatile("cp.async.wait_group 0;");
#endif
  __syncthreads();  // x in shared memory is read no more
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
      parts[((warp * WR + side) * M * NT + m * NT + n) * 32 + lane] =
          make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]);
  __syncthreads();
  for (u32 i = threadIdx.x; i < WR * M * NT * 32; i += THREADS) {
    const Residual residual = next;
    next = read_residual(i + THREADS);
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < WK; k++) {
      const float4 part = parts[k * WR * M * NT * 32 + i];
      sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
    const u32 m = i / 32 / NT, n = i / 32 % NT, row = (i & 31) >> 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 token = 8 * n + 2 * (i & 3) + j;
#if PAIRS == 3
      if (first_place + token >= end) continue;
      const u32 pair = a.pair[first_place + token];
      token = OUT_BY_PLACE ? first_place + token : pair;
#elif PAIRS
      if (token) continue;
      token = blockIdx.y;
#else
      if (token >= a.num_rows) continue;
#endif
      const float upper = FP8 ? sum[j] : sum[j] * 0x1p20f;
      const float lower = FP8 ? sum[2 + j] : sum[2 + j] * 0x1p20f;
#pragma unroll
      for (int h = 0; h < (SILU ? 1 : 2); h++) {
        const u32 out = first + m * outs_of_tile + row + 8 * h;
        if (out >= num_outs) continue;
        float y = h ? lower : upper;
#if PAIRS == 2
        for (u32 k = 0; a.bias && k < TOP_K; k++) {
          const u32 pair = token * TOP_K + k;
          y += a.factor[pair] * of_bf16(a.bias[(u64)a.expert[pair] * num_lines + out]);
        }
#else
        const u16* const bias = a.bias + expert * num_lines;
        if (a.bias) y += of_bf16(bias[out]);
#endif
#if PAIRS == 3
        if (a.factor) y *= a.factor[pair];
#endif
        y = rounded(y);
#if SILU
        float up = lower;
        if (a.bias) up += of_bf16(bias[out + num_outs]);
#if CLAMP  // NaN stays
        up = rounded(up);
        y = y > a.limit ? a.limit : y;
        up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
        y = (up + 1.0f) * y / (1.0f + __expf(-a.alpha * y));
#else
        y = rounded(y / (1.0f + __expf(-y))) * rounded(up);
#endif
#endif
        const u64 at = (u64)token * num_outs + out;
        if (a.residual) y = rounded(y) + of_bf16(residual.of[j][h]);
        a.out[at] = to_bf16(y);
      }
    }
  }
}
