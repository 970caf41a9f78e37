// Products in bf16 with packed weights by warpgroups (wgmma, sm_90a).
//
//   y = silu_mul(x · weightᵀ + bias) + residual, and (x · weightᵀ + bias) · factor of experts
//
// A program multiplies 64 · GROUPS weight rows by NR rows of x, over a part of the depth. One warp
// copies: codes and x come as chunks of 128 columns through the copy unit into a ring of STAGES; the
// codes are on their way before the kernel that makes x has ended. Each of GROUPS warpgroups takes 64
// weight rows: a code becomes a number in the registers of the thread that the matrix units want it
// from, as the left operand. SPLIT programs of a cluster share the depth and add their sums in shared
// memory, in their order. Of experts, whose pairs are sorted, a program has pairs of one.
//
// Constants, by -D: BITS (4 or 8), E2M1 (numbers in e2m1), OFFSET, SCALE (0 fp32, 1 bf16, 2 fp16),
// SCALES (of a weight row in a chunk: 1, 2 or 4), GROUPS, NR, STAGES, SPLIT, SILU, CLAMP (SILU is a
// clamped SwiGLU), EXPERTS (x and, if OUT_BY_PLACE, the result are in the order of pairs), PDL.
//
// t thread of four | g group of four threads: the weight row in a tile of 8

#include "packed_codes.cuh"

struct __align__(64) Map { u64 words[16]; };  // CUtensorMap

struct Args {
  Map x_map;             // [T, D] bf16 in boxes of NR rows and 64 columns
  Map code_map;          // [(E ·) O, D · BITS / 8] in boxes of the rows of a program and 128 columns
  const u8* scale;       // [(E,) R, G]
  const u8* offset;      // [(E,) O, G]
  const u16* bias;       // [(E,) O]
  const u16* residual;   // [T, num_outs]
  const int* pair;       // [P], sorted by expert: `moe_sort.Groups`
  const int* start;      // [E + 1]
  const float* factor;   // [P]
  u16* out;              // [T, num_outs]
  u32 num_rows, num_lines, depth;
  u32 group_shift;       // a scale is for 2^group_shift columns
  u32 rows_shift;        // and for 2^rows_shift weight rows
  u32 num_groups;
  u32 tiles_of_x;        // programs that share codes; of experts, tiles of weight rows
  u32 num_experts;
  float alpha, limit;    // of CLAMP
};

#define CHUNK 128
#define LINES (64 * GROUPS)
#define LINE_BYTES (CHUNK * BITS / 8)
#define X_BYTES (NR * CHUNK * 2)
#define CODE_BYTES (LINES * LINE_BYTES)
#define STAGE_BYTES (X_BYTES + CODE_BYTES)
#define WORKERS (128 * GROUPS)
#define NUM_ACC (NR / 2)
#define SCALE_BYTES (SCALE == 0 ? 4 : 2)
#define BATCH (SPLIT > 4 ? 2 : SPLIT > 2 ? 3 : 4)  // sums that a thread finishes together

__device__ __forceinline__ void copy_box(const Map* map, u32 to, u32 barrier, u32 column, u32 row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// acc += left · x of 16 columns. The left operand is in registers, x in shared memory.
__device__ __forceinline__ void multiply(float (&acc)[NUM_ACC], const u32 (&left)[4], u64 x) {
#define R4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define N4 "%0, %1, %2, %3"
#define N8 N4 ", %4, %5, %6, %7"
#define N16 N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define N24 N16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define N32 N24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define N40 N32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define N48 N40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define N56 N48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define N64 N56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define R48 R16(0) COMMA R16(16) COMMA R16(32)
#define PRODUCT(shape, sums, operands, a0, a1, a2, a3, desc)                                       \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" sums "}, {%" #a0 ", %" #a1 \
               ", %" #a2 ", %" #a3 "}, %" #desc ", 1, 1, 1, 0;"                                    \
               : operands                                                                          \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(x))
#define COMMA ,
#if NR == 16
  PRODUCT("m64n16k16", N8, R4(0) COMMA R4(4), 8, 9, 10, 11, 12);
#elif NR == 32
  PRODUCT("m64n32k16", N16, R16(0), 16, 17, 18, 19, 20);
#elif NR == 48
  PRODUCT("m64n48k16", N24, R16(0) COMMA R4(16) COMMA R4(20), 24, 25, 26, 27, 28);
#elif NR == 64
  PRODUCT("m64n64k16", N32, R16(0) COMMA R16(16), 32, 33, 34, 35, 36);
#elif NR == 80
  PRODUCT("m64n80k16", N40, R16(0) COMMA R16(16) COMMA R4(32) COMMA R4(36), 40, 41, 42, 43, 44);
#elif NR == 96
  PRODUCT("m64n96k16", N48, R48, 48, 49, 50, 51, 52);
#elif NR == 112
  PRODUCT("m64n112k16", N56, R48 COMMA R4(48) COMMA R4(52), 56, 57, 58, 59, 60);
#elif NR == 128
  PRODUCT("m64n128k16", N64, R48 COMMA R16(48), 64, 65, 66, 67, 68);
#endif
}

// Keeps the compiler from moving what reads or writes sums across products that are on their way.
__device__ __forceinline__ void hold(float (&acc)[NUM_ACC]) {
#pragma unroll
  for (int i = 0; i < NUM_ACC; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

// Bytes 2t, 2t + 1, 2t + 8 and 2t + 9 of a piece of 16 bytes: two columns and those 8 after them.
__device__ __forceinline__ u32 word_of(const u8* piece, int t) {
  const u32 low = *reinterpret_cast<const u16*>(piece + 2 * t);
  const u32 high = *reinterpret_cast<const u16*>(piece + 2 * t + 8);
  return low | high << 16;
}

// Where the copy unit puts a piece of 16 bytes of a line of codes.
__device__ __forceinline__ u32 place_of(u32 line, u32 piece) {
  const u32 moved = BITS == 4 ? piece ^ (line >> 1 & 3) : piece ^ (line & 7);
  return line * LINE_BYTES + moved * 16;
}

// A number of the program s of the cluster, at the address of this one's.
__device__ __forceinline__ float4 load_part(u32 address, u32 s) {
  u32 at;
  float4 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(address), "r"(s));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
               : "r"(at));
  return r;
}

// What a program multiplies: rows of x from `first` on, by a weight.
struct Part {
  u32 first, num_rows;
  u32 first_line;        // of its codes, where the weights of all experts are below each other
  const u8 *scale, *offset;
  const u16* bias;
};

struct Scales { float scale[SCALES][2], offset[SCALES][2]; };

__device__ __forceinline__ void load_scales(Scales& s, const Args& a, const Part& of,
                                            const u32 (&line)[2], u32 column) {
#pragma unroll
  for (int i = 0; i < SCALES; i++) {
    u32 at = column + i * (CHUNK / SCALES);
    at = at < a.depth ? at : a.depth - 1;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 idx = (line[h] >> a.rows_shift) * a.num_groups + (at >> a.group_shift);
      s.scale[i][h] = load_scale(of.scale, idx);
      s.offset[i][h] = OFFSET ? load_scale(of.offset, idx) : 0;
    }
  }
}

// What is added to the sums of a thread for 8 rows of x. It is read before other results are
// written: the compiler cannot tell the two apart, and a thread would wait for each.
struct Residual { u16 of[2][2]; };

__device__ __forceinline__ Residual read_residual(const Args& a, const u32 (&line)[2], u32 token,
                                                  u32 num_outs) {
  Residual r = {};
  if (a.residual)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int h = 0; h < (SILU ? 1 : 2); h++)
        if (token + j < a.num_rows && line[h] < num_outs)
          r.of[j][h] = a.residual[(u64)(token + j) * num_outs + line[h]];
  return r;
}

// The sums of a thread for 8 rows of x: {row g, row g + 8} × {2t, 2t + 1}.
__device__ __forceinline__ void finish(const Args& a, const Part& of, const float4& sum,
                                       const Residual& residual, const u32 (&line)[2], u32 token,
                                       u32 num_outs) {
  const float values[2][2] = {{sum.x * 0x1p20f, sum.y * 0x1p20f},
                              {sum.z * 0x1p20f, sum.w * 0x1p20f}};
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if (token + j >= of.num_rows) continue;
    u32 row = token + j;
#if EXPERTS
    const u32 place = of.first + row, pair = a.pair[place];
    const float factor = a.factor ? a.factor[pair] : 1;
    row = OUT_BY_PLACE ? place : pair;
#endif
#pragma unroll
    for (int h = 0; h < (SILU ? 1 : 2); h++) {
      if (line[h] >= num_outs) continue;
      float y = values[h][j];
      if (a.bias) y += of_bf16(of.bias[line[h]]);
#if EXPERTS
      y *= factor;
#endif
      y = rounded(y);
#if SILU
      float up = values[1][j];
      if (a.bias) up += of_bf16(of.bias[line[1]]);
#if CLAMP  // NaN stays
      up = rounded(up);
      y = y > a.limit ? a.limit : y;
      up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
      y = (up + 1.0f) * y / (1.0f + __expf(-a.alpha * y));
#else
      y = rounded(y / (1.0f + __expf(-y))) * rounded(up);
#endif
#endif
      if (a.residual) y = rounded(y) + of_bf16(residual.of[j][h]);
      a.out[(u64)row * num_outs + line[h]] = to_bf16(y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        packed_wgmma(const __grid_constant__ Args a) {
  extern __shared__ u8 unaligned[];
  u8* const shared = unaligned + (-shared_address(unaligned) & 1023u);
  // the ring | barriers of full and empty stages
  u64* const barriers = reinterpret_cast<u64*>(shared + STAGES * STAGE_BYTES);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 part = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT;
  const u32 num_outs = SILU ? a.num_lines / 2 : a.num_lines;
#if EXPERTS
  const u32 x_tile = 0, line_tile = tile % a.tiles_of_x, pairs_tile = tile / a.tiles_of_x;
#else
  const u32 x_tile = tile % a.tiles_of_x, line_tile = tile / a.tiles_of_x;
#endif
  const u32 num_chunks = (a.depth + CHUNK - 1) / CHUNK, each = (num_chunks + SPLIT - 1) / SPLIT;
  const u32 first_chunk = part * each;
  const u32 num_steps =
      first_chunk >= num_chunks ? 0 : (num_chunks - first_chunk < each ? num_chunks - first_chunk : each);
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
#endif
#if EXPERTS
  // as in packed_linear.cu: the tiles of expert e begin at start[e] / NR + e
  wait_for_earlier_kernels();
  float num_begun = 0;
  for (u32 e = threadIdx.x % 32; e < a.num_experts; e += 32)
    num_begun += (u32)a.start[e] / NR + e <= pairs_tile;
#pragma unroll
  for (int i = 16; i; i /= 2) num_begun += __shfl_xor_sync(0xffffffff, num_begun, i);
  const u32 expert = (u32)num_begun - 1, begin = a.start[expert], last = a.start[expert + 1];
  const u32 first = begin + (pairs_tile - (begin / NR + expert)) * NR;
  if (first >= last) return;
  const u64 num_scales = (u64)(((a.num_lines - 1) >> a.rows_shift) + 1) * a.num_groups * SCALE_BYTES;
  const Part of = {first, last - first, expert * a.num_lines, a.scale + expert * num_scales,
                   a.offset + expert * num_scales, a.bias + (u64)expert * a.num_lines};
#else
  const Part of = {x_tile * NR, a.num_rows, 0, a.scale, a.offset, a.bias};
#endif
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * s), "n"(4 * GROUPS)
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  float acc[NUM_ACC];
#pragma unroll
  for (int i = 0; i < NUM_ACC; i++) acc[i] = 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // rows g and g + 8 of a warp's tile: with SILU a gate, and the row of `up` that belongs to it
  const u32 first_line = line_tile * (SILU ? LINES / 2 : LINES);
  const u32 in_tile[2] = {SILU ? warp * 8u + g : warp * 16u + g,
                          SILU ? LINES / 2 + warp * 8u + g : warp * 16u + g + 8u};
  u32 line[2] = {first_line + in_tile[0],
                 SILU ? num_outs + first_line + in_tile[0] : first_line + in_tile[1]};

  if (warp == WORKERS / 32) {
    if (lane == 0) {
      const u32 ring = shared_address(shared);
      auto copy_codes = [&](u32 step) {
        const u32 barrier = full + 8 * (step % STAGES);
        const u32 to = ring + step % STAGES * STAGE_BYTES + X_BYTES;
        const u32 at = (first_chunk + step) * LINE_BYTES;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                     "n"(STAGE_BYTES)
                     : "memory");
        copy_box(&a.code_map, to, barrier, at, of.first_line + first_line);
#if SILU
        copy_box(&a.code_map, to + CODE_BYTES / 2, barrier, at,
                 of.first_line + num_outs + first_line);
#endif
      };
      auto copy_x = [&](u32 step) {
        const u32 barrier = full + 8 * (step % STAGES);
        const u32 to = ring + step % STAGES * STAGE_BYTES, column = (first_chunk + step) * CHUNK;
        copy_box(&a.x_map, to, barrier, column, of.first);
        copy_box(&a.x_map, to + X_BYTES / 2, barrier, column + 64, of.first);
      };
      const u32 ahead = num_steps < STAGES ? num_steps : STAGES;
      for (u32 step = 0; step < ahead; step++) copy_codes(step);
      if (!EXPERTS) wait_for_earlier_kernels();
      for (u32 step = 0; step < ahead; step++) copy_x(step);
      for (u32 step = STAGES; step < num_steps; step++) {
        wait_for(empty + 8 * (step % STAGES), (step / STAGES - 1) & 1);
        copy_codes(step);
        copy_x(step);
      }
    }
  } else {
    u32 real_line[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
      real_line[h] = line[h] < a.num_lines ? line[h] : a.num_lines - 1;
    Scales next;
    load_scales(next, a, of, real_line, first_chunk * CHUNK);
    if (!EXPERTS) wait_for_earlier_kernels();
    u32 left[2][2][4];
    hold(acc);
    for (u32 step = 0; step < num_steps; step++) {
      const u32 stage = step % STAGES;
      const Scales now = next;
      load_scales(next, a, of, real_line, (first_chunk + step + 1) * CHUNK);
      u32 low[SCALES][2], high[SCALES][2], less[SCALES][2];
#pragma unroll
      for (int i = 0; i < SCALES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          factors(now.scale[i][h], now.offset[i][h], low[i][h], high[i][h], less[i][h]);
      // of a descriptor: the address and strides in units of 16 bytes, and pieces exchanged by 128 bytes
      const u64 x = (u64)(((shared_address(shared) + stage * STAGE_BYTES) & 0x3ffff) >> 4) |
                    (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      const u8* const codes = shared + stage * STAGE_BYTES + X_BYTES;
      wait_for(full + 8 * stage, step / STAGES & 1);
#pragma unroll
      for (int k = 0; k < CHUNK / 32; k++) {
        u32(&to)[2][4] = left[k & 1];
        const int i = k * SCALES / 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
#if BITS == 4
          const u32 word = word_of(codes + place_of(in_tile[h], k), t);
          const Pairs p = numbers(word, low[i][h], high[i][h], less[i][h]);
          to[0][h] = p.of[0], to[0][2 + h] = p.of[1];
          to[1][h] = p.of[2], to[1][2 + h] = p.of[3];
#else
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const u32 word = word_of(codes + place_of(in_tile[h], 2 * k + j), t);
            const Pairs p = numbers(word, low[i][h], high[i][h], less[i][h]);
            to[j][h] = p.of[0], to[j][2 + h] = p.of[1];
          }
#endif
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int at = 2 * k + j;  // a half of a chunk of x has four steps of 16 columns
          multiply(acc, to[j], x + at / 4 * (NR * 8) + at % 4 * 2);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k == 0 && step && lane == 0) arrive(empty + 8 * ((step - 1) % STAGES));
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(acc);
#if SPLIT == 1
#pragma unroll
    for (int first = 0; first < NUM_ACC / 4; first += 2) {  // NR is 16 or more
      Residual residual[2];
#pragma unroll
      for (int b = 0; b < 2; b++)
        residual[b] = read_residual(a, line, x_tile * NR + 8 * (first + b) + 2 * t, num_outs);
#pragma unroll
      for (int b = 0; b < 2; b++) {
        const int i = first + b;
        finish(a, of, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]),
               residual[b], line, x_tile * NR + 8 * i + 2 * t, num_outs);
      }
    }
#endif
  }

#if SPLIT > 1
  __syncthreads();  // the ring is read no more
  float4* const mine = reinterpret_cast<float4*>(shared);
  if (threadIdx.x < WORKERS)
#pragma unroll
    for (int i = 0; i < NUM_ACC / 4; i++)
      mine[i * WORKERS + threadIdx.x] =
          make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  // this program finishes a part of the sums
  const u32 all = NUM_ACC / 4 * WORKERS, share = (all + SPLIT - 1) / SPLIT;
  const u32 end = (part + 1) * share < all ? (part + 1) * share : all;
  for (u32 first = part * share + threadIdx.x; first < end; first += BATCH * (WORKERS + 32)) {
    float4 parts[BATCH][SPLIT];  // all on their way together
    Residual residual[BATCH];
    u32 lines[BATCH][2], token[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const u32 i = first + b * (WORKERS + 32);
      const u32 thread = i % WORKERS, of_warp = thread / 32, of_g = thread / 4 % 8;
      const u32 at = first_line + (SILU ? of_warp * 8 + of_g : of_warp * 16 + of_g);
      lines[b][0] = at, lines[b][1] = SILU ? num_outs + at : at + 8;
      token[b] = x_tile * NR + i / WORKERS * 8 + thread % 4 * 2;
      if (i >= end) continue;
#pragma unroll
      for (int s = 0; s < SPLIT; s++) parts[b][s] = load_part(shared_address(mine + i), s);
      residual[b] = read_residual(a, lines[b], token[b], num_outs);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (first + b * (WORKERS + 32) >= end) continue;
      float4 sum = {0, 0, 0, 0};
#pragma unroll
      for (int s = 0; s < SPLIT; s++) {
        const float4& one = parts[b][s];
        sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
      }
      finish(a, of, sum, residual[b], lines[b], token[b], num_outs);
    }
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
