// Products of persistent.cu: a program's tiles of a weight, for all rows of x.

// Waits for x, normed if NORM, and puts it into shared memory.
__device__ __forceinline__ void read_normed(Worker& w) {
  const Task& t = *w.task;
  uint2 weight[NORM_PIECES];
  const uint2* const norm = reinterpret_cast<const uint2*>(t.second_input);
#pragma unroll
  for (int i = 0; i < NORM_PIECES; i++) weight[i] = __ldg(norm + threadIdx.x + i * WORKERS);
  u32 x[ROWS * NORM_PIECES][2];
  const u64* const words = w.a.words + t.in_at + 2 * threadIdx.x;
#pragma unroll
  for (int first = 0; first < ROWS * NORM_PIECES; first += NORM_BATCH) {
    Pair v[NORM_BATCH];
    fetch(w, v, t.in_phase, [&](int i) -> const u64* {
      return first + i < ROWS * NORM_PIECES ? words + 2 * (first + i) * WORKERS : nullptr;
    });
#pragma unroll
    for (int i = 0; i < NORM_BATCH; i++)
      if (first + i < ROWS * NORM_PIECES) x[first + i][0] = v[i].a, x[first + i][1] = v[i].b;
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < 2 * NORM_PIECES; i++) {
      const u32 word = x[row * NORM_PIECES + i / 2][i % 2];
      const float low = of_bf16(word & 0xffff), high = __uint_as_float(word & 0xffff0000);
      square += low * low + high * high;
    }
#pragma unroll
    for (int i = 16; i; i /= 2) square += __shfl_xor_sync(0xffffffff, square, i);
    if (w.lane == 0) w.squares[row * WARPS + w.warp] = square;
  }
  meet();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) square += w.squares[row * WARPS + i];
    const float factor = rsqrtf(square / HIDDEN + w.a.eps);
#pragma unroll
    for (int i = 0; i < NORM_PIECES; i++) {
      u32 found[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 word = x[row * NORM_PIECES + i][j], by = j ? weight[i].y : weight[i].x;
        const float low = rounded(of_bf16(word & 0xffff) * factor) * of_bf16(by & 0xffff);
        const float high =
            rounded(__uint_as_float(word & 0xffff0000) * factor) * __uint_as_float(by & 0xffff0000);
        found[j] = to_bf16(low) | to_bf16(high) << 16;
      }
      u8* const to = w.x + row * X_PITCH(HIDDEN) + (threadIdx.x + i * WORKERS) * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(found[0], found[1]);
    }
  }
}

__device__ __forceinline__ void read_plain(Worker& w) {
  const Task& t = *w.task;
  const u32 each = t.depth / 4, total = ROWS * each;
  const u64* const words = w.a.words + t.in_at;
  const float inverse = 1.0f / each;  // exact enough for so few pieces
  for (u32 first = threadIdx.x; first < total; first += BATCH * WORKERS) {
    Pair v[BATCH];
    fetch(w, v, t.in_phase, [&](int i) -> const u64* {
      return first + i * WORKERS < total ? words + 2 * (first + i * WORKERS) : nullptr;
    });
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const u32 piece = first + i * WORKERS;
      if (piece >= total) continue;
      const u32 row = ROWS == 1 ? 0 : (u32)((piece + 0.5f) * inverse);
      u8* const to = w.x + row * X_PITCH(t.depth) + (piece - row * each) * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(v[i].a, v[i].b);
    }
  }
}

// The number of the first of the two results that a thread and its neighbour have together.
__device__ __forceinline__ u32 out_of(const Task& t, u32 tile, int g, int h) {
  return (t.flags & (SILU | HALF) ? tile * 8 : tile * 16 + 8 * h) + (g & ~1);
}

// Residuals of a thread's results, in pairs of words of which one is read.
struct Residual { Pair of[2][2]; };

__device__ __forceinline__ const u64* residual_at(const Worker& w, const Task& t, u32 token, u32 out) {
  return w.a.words + t.add_at + ((token * t.num_outs + out) / 2 & ~1u);
}

__device__ __forceinline__ bool has_result(const Task& t, int thread, int h, int j) {
  return (j == 0 || ROWS > 1) && 2 * thread + j < ROWS && !(h && t.flags & (SILU | HALF));
}

// Stores the results of a tile: of the thread's weight rows g and g + 8 and rows 2t and 2t + 1 of x.
__device__ __forceinline__ void finish(Worker& w, const Task& t, const float (&sum)[4], Residual& residual,
                                       u32 tile) {
  const int g = w.lane / 4, thread = w.lane % 4;
#pragma unroll
  for (int j = 0; j < (ROWS > 1 ? 2 : 1); j++) {
    const u32 token = 2 * thread + j;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (h && t.flags & (SILU | HALF)) continue;
      float y = rounded(sum[2 * h + j]);
      if (t.flags & SILU) y = rounded(__fdividef(y, 1.0f + __expf(-y))) * rounded(sum[2 + j]);
      const float other = __shfl_xor_sync(0xffffffff, y, 4);  // of the next weight row
      if (token >= ROWS || g & 1) continue;
      const u32 out = out_of(t, tile, g, h), at = (token * t.num_outs + out) / 2;
      float low = y, high = other;
      if (t.flags & ADD) {
        Pair& v = residual.of[h][j];
        if (!has(v, w.base + t.add_phase)) {
          Pair again[1];
          fetch(w, again, t.add_phase, [&](int) { return residual_at(w, t, token, out); });
          v = again[0];
        }
        const u32 word = at & 1 ? v.b : v.a;
        low = rounded(low) + of_bf16(word & 0xffff);
        high = rounded(high) + __uint_as_float(word & 0xffff0000);
      }
      const u32 word = to_bf16(low) | to_bf16(high) << 16;
      if (t.flags & LOGITS)
        reinterpret_cast<u32*>(w.a.logits)[at] = word;
      else
        store_word(w.a.words + t.out_at + at, word, w.base + t.out_phase);
    }
  }
}

// A warp's columns of a stage: 32 from `first` on, and so on for each WARPS · 32. Rows g and g + 8 of
// the tile are 8 rows of the stage apart; of a half there are no rows g + 8.
template <bool IS_HALF>
__device__ __forceinline__ void multiply_stage(float (&acc)[2][4], const u8* weights, const u8* x, u32 num,
                                               u32 first, bool has_x) {
  constexpr u32 PITCH = (IS_HALF ? 2 : 1) * WIDE * 2 + 64, TURNS = (IS_HALF ? 2 : 1) * WIDE / WORKERS;
  Four lower[TURNS], upper[TURNS], by[TURNS];
#pragma unroll
  for (u32 i = 0; i < TURNS; i++) {
    const u32 c = first + i * WORKERS;
    lower[i] = upper[i] = by[i] = Four{0, 0, 0, 0};
    if (c < num) {
      lower[i] = load_four(weights + c * 2);
      if (!IS_HALF) upper[i] = load_four(weights + 8 * PITCH + c * 2);
      if (has_x) by[i] = load_four(x + c * 2);
    }
  }
#pragma unroll
  for (u32 i = 0; i < TURNS; i++) {
    multiply(acc[0], lower[i].a, upper[i].a, lower[i].b, upper[i].b, by[i].a, by[i].b);
    multiply(acc[1], lower[i].c, upper[i].c, lower[i].d, upper[i].d, by[i].c, by[i].d);
  }
}

// Multiplies a tile: the warp's part of the depth. Sums of the rows of x that there are go to `to`.
__device__ __forceinline__ void multiply_tile(Worker& w, const u8* x_row, u32 depth, bool is_half,
                                              float4* to) {
  const int g = w.lane / 4, thread = w.lane % 4;
  const u32 wide = is_half ? 2 * WIDE : WIDE;
  float acc[2][4] = {};
  for (u32 column = 0; column < depth; column += wide) {
    const u32 num = depth - column < wide ? depth - column : wide;
    const u8* const from = w.ring + w.stage.at * STAGE_BYTES + g * (wide * 2 + 64) + thread * 16;
    wait_for(w.full + 8 * w.stage.at, w.stage.parity);
    if (is_half)
      multiply_stage<true>(acc, from, x_row + column * 2, num, w.warp * 32, g < ROWS);
    else
      multiply_stage<false>(acc, from, x_row + column * 2, num, w.warp * 32, g < ROWS);
    __syncwarp();
    if (w.lane == 0) arrive(w.empty + 8 * w.stage.at);
    w.stage.advance(STAGES);
  }
  if (thread < COLUMN_PAIRS)
    *to = make_float4(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1], acc[0][2] + acc[1][2],
                      acc[0][3] + acc[1][3]);
}

__device__ __forceinline__ void product(Worker& w) {
  const Task t = *w.task;  // in registers: shared memory would be read again after each store
  if (t.flags & NORM)
    read_normed(w);
  else
    read_plain(w);
  meet();
  note(w, 1);
  const int g = w.lane / 4, thread = w.lane % 4;
  const u8* const x_row = w.x + g * X_PITCH(t.depth) + thread * 16;
  for (u32 first = t.first; first < t.first + t.count; first += AT_ONCE, w.turn ^= 1) {
    // warps multiply all of these tiles, then the first warps finish one each
    const u32 num = t.first + t.count - first < AT_ONCE ? t.first + t.count - first : AT_ONCE;
    const bool is_finishing = w.warp < (int)num;
    const u32 own = first + w.warp;
    Residual residual = {};
    if (is_finishing && t.flags & ADD && !(g & 1))
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (has_result(t, thread, h, j))
            residual.of[h][j] = load_words(residual_at(w, t, 2 * thread + j, out_of(t, own, g, h)));
    float4* const sums = reinterpret_cast<float4*>(w.scratch) + w.turn * (AT_ONCE * SUMS_OF_TILE);
    const u32 place = g * COLUMN_PAIRS + thread;
    for (u32 i = 0; i < num; i++)
      multiply_tile(w, x_row, t.depth, t.flags & HALF,
                    sums + i * SUMS_OF_TILE + w.warp * (8 * COLUMN_PAIRS) + place);
    meet();
    if (!is_finishing) continue;
    float sum[4] = {0, 0, 0, 0};
    if (thread < COLUMN_PAIRS)
#pragma unroll
      for (int k = 0; k < WARPS; k++) {
        const float4 one = sums[w.warp * SUMS_OF_TILE + k * (8 * COLUMN_PAIRS) + place];
        sum[0] += one.x, sum[1] += one.y, sum[2] += one.z, sum[3] += one.w;
      }
    finish(w, t, sum, residual, own);
  }
}
