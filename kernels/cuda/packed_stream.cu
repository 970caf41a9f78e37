// Products of one or a few rows in bf16 with packed weights, which stream through shared memory.
//
//   y = silu_mul(rms_norm(x) · weightᵀ + bias) + residual, and the same for a token's experts
//
// A program stays on its multiprocessor and takes one tile of 16 weight rows after the other. One
// warp copies: the copy unit fills a ring of STAGES, each with SEGMENT bytes of the tile's rows, and
// goes on to the next tile. The ring is full before the kernel that makes x has ended, so memory is
// not idle while kernels wait for each other. Eight warps share the depth: each multiplies 64 bytes
// of every row of a stage as in packed_linear.cu, and they add their sums in shared memory, in their
// order.
//
// Constants, by -D: BITS (4 or 8), FP8 (codes are float8_e4m3fn), OFFSET, SCALE (0 fp32, 1 bf16,
// 2 fp16), DEPTH, GROUP_SHIFT and ROWS_SHIFT (a scale is for so many columns and weight rows, as
// powers of two), NUM_GROUPS, STAGES, SLOTS (scales of tiles on their way), SILU, NORM (one row of x
// is normed first), PAIRS (0 a product, 1 a product for each of a token's experts, 2 the sum over them),
// TOP_K (experts of a token), PDL.
//
// t thread of four | g group of four threads: the weight row in a half of a tile, and the row of x

#include "packed_codes.cuh"

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
#define EACH (CHUNK / 4)                       // of a thread
#define XS (EACH / 8)                          // its pieces of 16 bytes of x
#define SCALE_BYTES (SCALE == 0 ? 4 : 2)
#define SCALE_ROWS (ROWS_SHIFT ? 1 : 8)        // of a half of a tile
#define HALF_BYTES (SCALE_ROWS * NUM_GROUPS * SCALE_BYTES)
#define SLOT_BYTES ((OFFSET ? 4 : 2) * HALF_BYTES)
#define BARRIER_BYTES ((2 * STAGES + 2 * SLOTS + 1) / 2 * 16)
#define X_PIECES (DEPTH / 8)
#define X_PITCH (DEPTH * 2 + 32)
#define PARTS (PAIRS == 2 ? TOP_K : 1)         // products that a tile adds
#define MINE ((X_PIECES + WORKERS - 1) / WORKERS)  // pieces that a thread norms

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

// The place of a piece of 16 bytes in a row of x: neighbours are exchanged against bank conflicts.
__device__ __forceinline__ u32 place(u32 piece) { return (piece ^ (piece >> 3 & 1)) * 16; }

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

// The expert of a part of a tile, and where its weight rows begin.
__device__ __forceinline__ u32 expert_of(const Args& a, u32 tile, u32 part) {
  return PAIRS == 0 ? 0 : a.expert[PAIRS == 1 ? tile / a.tiles_each : part];
}

__device__ __forceinline__ u32 tile_of(const Args& a, u32 tile) {  // of its expert
  return PAIRS == 1 ? tile % a.tiles_each : tile;
}

// Copies a part of a tile.
__device__ __forceinline__ void copy_part(const Args& a, u32 tile, u32 expert, u32 ring, u32 slots,
                                          u32 barriers, Ring& stage, Ring& slot) {
  const u32 full = barriers, empty = full + 8 * STAGES;
  const u32 slot_full = empty + 8 * STAGES, slot_empty = slot_full + 8 * SLOTS;
  const u32 num_lines = SILU ? 2 * a.num_outs : a.num_outs;
  const u32 first_scale = expert * (((num_lines - 1) >> ROWS_SHIFT) + 1);
  wait_for(slot_empty + 8 * slot.at, slot.parity);
  expect(slot_full + 8 * slot.at, SLOT_BYTES);
#pragma unroll
  for (int i = 0; i < (OFFSET ? 4 : 2); i++) {
    const u32 row = first_scale + (weight_row(a, tile, 8 * (i & 1)) >> ROWS_SHIFT);
    copy(slots + slot.at * SLOT_BYTES + i * HALF_BYTES,
         (i < 2 ? a.scale : a.offset) + (u64)row * (NUM_GROUPS * SCALE_BYTES), HALF_BYTES,
         slot_full + 8 * slot.at);
  }
  slot.advance(SLOTS);
  const u32 first_row = expert * num_lines;
  const u32 rows[2] = {first_row + weight_row(a, tile, 0), first_row + weight_row(a, tile, 8)};
  for (u32 step = 0; step < STEPS; step++) {
    const u32 barrier = full + 8 * stage.at, to = ring + stage.at * STAGE_BYTES;
    wait_for(empty + 8 * stage.at, stage.parity);
    expect(barrier, STAGE_BYTES);
#pragma unroll
    for (int h = 0; h < 2; h++)
      copy_box(&a.code_map, to + h * BOX_BYTES, barrier, step * (SEGMENT / 128), rows[h]);
    stage.advance(STAGES);
  }
}

// Copies all tiles of this program, by one thread. `ring` and `slots` are the places of codes and
// scales.
__device__ __forceinline__ void produce(const Args& a, u32 ring, u32 slots, u32 barriers) {
  Ring stage, slot;
  stage.parity = slot.parity = 1;  // a first pass finds every place empty
  if (PAIRS) wait_for_earlier_kernels();  // that choose the experts
  for (u32 tile = blockIdx.x; tile < a.num_tiles; tile += gridDim.x)
    for (u32 part = 0; part < PARTS; part++)
      copy_part(a, tile_of(a, tile), expert_of(a, tile, part), ring, slots, barriers, stage, slot);
}

__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

// Copies x to shared memory, one row normed if NORM. It waits for the kernel that makes x.
__device__ __forceinline__ void read_x(const Args& a, u8* to, float* squares) {
#if NORM
  Four weight[MINE], x[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const u32 piece = threadIdx.x + i * WORKERS;
    weight[i] = piece < X_PIECES ? load_four(a.norm + piece * 8) : Four{0, 0, 0, 0};
  }
  wait_for_earlier_kernels();
  float square = 0;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const u32 piece = threadIdx.x + i * WORKERS;
    x[i] = piece < X_PIECES ? load_four(a.x + piece * 8) : Four{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < MINE; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 word = word_of(x[i], j);
      const float low = of_bf16(word & 0xffff), high = __uint_as_float(word & 0xffff0000);
      square += low * low + high * high;
    }
#pragma unroll
  for (int i = 16; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
  meet();
  square = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) square += squares[i];
  const float factor = rsqrtf(square / DEPTH + a.eps);
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const u32 piece = threadIdx.x + i * WORKERS;
    u32 found[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 word = word_of(x[i], j), by = word_of(weight[i], j);
      const float low = of_bf16(word & 0xffff) * factor * of_bf16(by & 0xffff);
      const float high =
          __uint_as_float(word & 0xffff0000) * factor * __uint_as_float(by & 0xffff0000);
      found[j] = to_bf16(low) | to_bf16(high) << 16;
    }
    if (piece < X_PIECES)
      *reinterpret_cast<Four*>(to + place(piece)) = Four{found[0], found[1], found[2], found[3]};
  }
#else
  wait_for_earlier_kernels();
  for (u32 i = threadIdx.x; i < a.num_rows * X_PIECES; i += WORKERS) {
    const u32 row = i / X_PIECES, piece = i % X_PIECES;
    *reinterpret_cast<Four*>(to + row * X_PITCH + place(piece)) =
        load_four(a.x + row * a.x_stride + piece * 8);
  }
#endif
  meet();
}

// Of a thread: weight rows g and g + 8 of the tile, for rows 2t and 2t + 1 of x.
struct Outs {
  float of[2][2];
};

__device__ __forceinline__ u32 num_tokens(const Args& a) { return PAIRS ? 1 : a.num_rows; }

__device__ __forceinline__ u32 out_of(u32 tile, int g, int h) {
  return SILU ? tile * 8 + g : tile * 16 + g + 8 * h;
}

__device__ __forceinline__ Outs read_residual(const Args& a, u32 tile, int g, int t) {
  Outs r;
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 token = 2 * t + j;
      const bool is_real = a.residual && token < num_tokens(a) && (!SILU || h == 0);
      r.of[h][j] = is_real ? of_bf16(a.residual[(u64)token * a.num_outs + out_of(tile, g, h)]) : 0;
    }
  return r;
}

__device__ __forceinline__ void finish(const Args& a, const float (&sum)[4], const Outs& residual,
                                       u32 tile, u32 out_row, int g, int t) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const u32 token = 2 * t + j;
    if (token >= num_tokens(a)) continue;
    const float values[2] = {FP8 ? sum[j] : sum[j] * 0x1p20f, FP8 ? sum[2 + j] : sum[2 + j] * 0x1p20f};
#pragma unroll
    for (int h = 0; h < (SILU ? 1 : 2); h++) {
      const u32 out = out_of(tile, g, h);
      float y = values[h];
      if (a.bias) y += of_bf16(a.bias[out]);
      y = rounded(y);
#if SILU
      float up = values[1];
      if (a.bias) up += of_bf16(a.bias[out + a.num_outs]);
      y = rounded(y / (1.0f + __expf(-y))) * rounded(up);
#endif
      if (a.residual) y = rounded(y) + residual.of[h][j];
      a.out[(u64)(out_row + token) * a.num_outs + out] = to_bf16(y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 2) packed_stream(
    const __grid_constant__ Args a) {
  extern __shared__ u8 unaligned[];
  u8* const shared = unaligned + (-shared_address(unaligned) & 1023u);
  // the ring | scales | barriers | sums of two tiles | x
  u8* const slots = shared + STAGES * STAGE_BYTES;
  u8* const after = slots + SLOTS * SLOT_BYTES;
  float4* const parts = reinterpret_cast<float4*>(after + BARRIER_BYTES);
  u8* const x_at = reinterpret_cast<u8*>(parts + 2 * WORKERS);
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
    if (lane == 0) produce(a, shared_address(shared), shared_address(slots), full);
    return;
  }

  read_x(a, x_at, reinterpret_cast<float*>(parts));
  const bool has_x = g < num_tokens(a);
  Ring stage, slot;
  u32 count = 0;
  for (u32 tile = blockIdx.x; tile < a.num_tiles; tile += gridDim.x, count++) {
    const bool is_mine = warp == (int)(count % WARPS);  // this warp finishes the tile
    Outs residual = {};
    if (is_mine) residual = read_residual(a, tile_of(a, tile), g, t);
    float acc[2][4] = {}, total[4] = {};
#pragma unroll 1
    for (u32 part = 0; part < PARTS; part++) {
#if PAIRS == 2
      const float factor = a.factor[part];
#endif
      const u8* const row_of_x = x_at + (PAIRS == 2 ? part : PAIRS ? 0 : g) * X_PITCH;
      wait_for(slot_full + 8 * slot.at, slot.parity);
      const u8* const scales = slots + slot.at * SLOT_BYTES;
#pragma unroll 1
      for (u32 step = 0; step < STEPS; step++) {
        const u32 column = (step * WARPS + warp) * CHUNK + t * EACH;
        const bool is_real = column < DEPTH;
        const u32 at = is_real ? column : 0;
        Four x[XS];
#pragma unroll
        for (int i = 0; i < XS; i++)
          x[i] = is_real && has_x ? load_four(row_of_x + place(at / 8 + i)) : Four{0, 0, 0, 0};
        float scale[2], offset[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          scale[h] = own_scale(scales + h * HALF_BYTES, g, at);
          offset[h] = OFFSET ? own_scale(scales + (2 + h) * HALF_BYTES, g, at) : 0;
        }
        wait_for(full + 8 * stage.at, stage.parity);
        const u8* const codes = shared + stage.at * STAGE_BYTES + place_of_code(g, warp * 4 + t);
        const Four code[2] = {load_four(codes), load_four(codes + BOX_BYTES)};
        __syncwarp();
        if (lane == 0) arrive(empty + 8 * stage.at);
        stage.advance(STAGES);

        u32 low[2], high[2], less[2];
#pragma unroll
        for (int h = 0; h < 2; h++) factors(scale[h], offset[h], low[h], high[h], less[h]);
        float product[2][4] = {};
        float(&sums)[2][4] = FP8 ? product : acc;
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const Pairs p = numbers(word_of(code[0], w), low[0], high[0], less[0]);
          const Pairs q = numbers(word_of(code[1], w), low[1], high[1], less[1]);
          // the columns of the lower and of the upper halves of bytes, for codes of 4 bits
          multiply(sums[w & 1], p.of[0], q.of[0], p.of[1], q.of[1], word_of(x[w / 2], 2 * (w & 1)),
                   word_of(x[w / 2], 2 * (w & 1) + 1));
#if BITS == 4
          multiply(sums[w & 1], p.of[2], q.of[2], p.of[3], q.of[3],
                   word_of(x[2 + w / 2], 2 * (w & 1)), word_of(x[2 + w / 2], 2 * (w & 1) + 1));
#endif
        }
        if (FP8)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[0][i] += (product[0][i] + product[1][i]) * scale[i / 2];
      }
      __syncwarp();
      if (lane == 0) arrive(slot_empty + 8 * slot.at);
      slot.advance(SLOTS);
#if PAIRS == 2
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total[i] += factor * (acc[0][i] + acc[1][i]);
        acc[0][i] = acc[1][i] = 0;
      }
#endif
    }
#if PAIRS != 2
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] = acc[0][i] + acc[1][i];
#endif

    float4* const sums = parts + (count & 1) * WORKERS;
    sums[warp * 32 + lane] = make_float4(total[0], total[1], total[2], total[3]);
    meet();
    if (is_mine) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < WARPS; k++) {
        const float4 one = sums[k * 32 + lane];
        sum[0] += one.x, sum[1] += one.y, sum[2] += one.z, sum[3] += one.w;
      }
      finish(a, sum, residual, tile_of(a, tile), PAIRS == 1 ? tile / a.tiles_each : 0, g, t);
    }
  }
}
