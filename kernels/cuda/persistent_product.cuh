// Products of persistent.cu: a program's tiles of a weight, for all rows of x.
//
// Warp w has the columns 32 w .. 32 w + 31 of each 256, a piece; of integers it has those of group w of each
// 1,024, four pieces. It waits only for its own columns of x and has those of a chunk in registers, as the
// matrix units read them: thread t of group g has eight columns of a piece, of row g. Several chunks stay in
// shared memory if there is room, else they are fetched again for each AT_ONCE tiles. The sums over all
// columns meet once, behind the tiles; a norm's factor is a factor of these sums.

// Of a product over DEPTH columns.
template <u32 DEPTH, u32 FLAGS>
struct Of {
  using Codes = typename Eight<FLAGS & CODED>::Type;
  static constexpr bool IS_HALF = FLAGS & HALF, IS_FP8 = FLAGS & OF_FP8, IS_INT4 = FLAGS & OF_INT4;
  static constexpr bool HAS_BLOCKS = IS_FP8 && BLOCK;
  static constexpr u32 BITS_EACH = IS_INT4 ? 4 : IS_FP8 ? 8 : 16;
  static constexpr u32 ROW_BYTES = (IS_HALF ? 2 : 1) * WIDE * 2, IN_STAGE = ROW_BYTES * 8 / BITS_EACH;  // columns
  static constexpr u32 PITCH = ROW_BYTES + ROW_END(FLAGS);
  static constexpr u32 WIDTH = DEPTH, CHUNK = chunk_of(DEPTH);
  static constexpr u32 CHUNKS = (DEPTH + CHUNK - 1) / CHUNK;
  static constexpr u32 NUM_STAGES = (CHUNK + IN_STAGE - 1) / IN_STAGE;  // of a tile
  static constexpr u32 TURNS = IN_STAGE / WORKERS;           // pieces of a stage
  static constexpr u32 PIECES = NUM_STAGES * TURNS;          // of 8 columns, of a thread
  static constexpr bool IS_RESIDENT = CHUNKS > 1 && ROWS * DEPTH * 2 <= RESIDENT_BYTES;  // in shared memory
  static constexpr u32 X_PITCH = ((IS_RESIDENT ? CHUNKS : 1) * PIECES + 1) * 64;  // rows g and g + 1: other banks
  static_assert(AT_X + WARPS * ROWS * X_PITCH <= SHARED_BYTES, "Sizes.shared_bytes has no room for x");
  static constexpr bool IS_EVEN = DEPTH % CHUNK == 0 && CHUNK % IN_STAGE == 0;
  static_assert(!IS_INT4 || WARPS * GROUP_COLUMNS == 4 * WORKERS, "a warp's four pieces are a group");

  // The last chunk may have fewer stages than the others.
  __device__ static __forceinline__ bool has_stage(u32 chunk, u32 stage) {
    return stage < NUM_STAGES && (IS_EVEN || chunk * CHUNK + stage * IN_STAGE < DEPTH);
  }

  // Whether a warp has columns in a piece of a chunk.
  __device__ static __forceinline__ bool has(u32 chunk, u32 piece, u32 warp) {
    return IS_EVEN || (piece * WORKERS < CHUNK && chunk * CHUNK + piece * WORKERS + warp * 32 < DEPTH);
  }
};

// Two numbers of x times the norm's weight; `square` grows by their squares.
__device__ __forceinline__ u32 weighted(u32 word, u32 weight, float& square) {
  const float low = low_of(word), high = high_of(word);
  square += low * low + high * high;
  return to_bf16_pair(low * low_of(weight), high * high_of(weight));
}

// Where a warp's columns of a chunk of x are in its own shared memory.
template <class P>
__device__ __forceinline__ u8* place_of_x(const Worker& w, u32 chunk) {
  return shared<u8>(AT_X) + w.warp * (ROWS * P::X_PITCH) + (P::IS_RESIDENT ? chunk * (P::PIECES * 64) : 0);
}

// Waits for a warp's columns of a chunk of x, and stores them for the threads that multiply them. Of a
// norm, they are multiplied by its weight, and the sums of their squares are added to `square`, a
// thread's part of each row.
template <u32 DEPTH, u32 FLAGS>
__device__ __forceinline__ void fetch_x(Worker& w, const Task& t, u32 chunk, float (&square)[ROWS]) {
  using P = Of<DEPTH, FLAGS>;
  constexpr u32 OF_ROW = (P::PIECES + 3) / 4, LOADS = ROWS * OF_ROW, BATCH = LOADS < 8 ? LOADS : 8;
  // a load is of four numbers; those of a warp are of 32 columns in four pieces
  const u32 of_warp = P::IS_INT4 ? w.lane / 8 * 32 + w.warp * GROUP_COLUMNS : w.lane / 8 * WORKERS + w.warp * 32;
  const u32 column = of_warp + w.lane % 8 * 4 + chunk * P::CHUNK;
  const u64* const words = w.a.words + t.in_at + column / 2;
  const u8* const norm = t.second_input + column * 2;
  u8* const to = place_of_x<P>(w, chunk) + w.lane * 8;
#pragma unroll
  for (u32 first = 0; first < LOADS; first += BATCH) {
    uint2 weight[BATCH];
    Pair v[BATCH];
    const auto is_read = [&](u32 i) {
      const u32 piece = (first + i) % OF_ROW * 4 + w.lane / 8;
      return first + i < LOADS && (P::PIECES % 4 == 0 || piece < P::PIECES) && P::has(chunk, piece, w.warp);
    };
#pragma unroll
    for (u32 i = 0; i < BATCH; i++)
      if (FLAGS & NORM && is_read(i))
        weight[i] = *reinterpret_cast<const uint2*>(norm + (first + i) % OF_ROW * (8 * WORKERS));
    fetch(w, v, t.in_phase, is_read, [&](u32 i) {
      return words + (first + i) / OF_ROW * (DEPTH / 2) + (first + i) % OF_ROW * (2 * WORKERS);
    });
#pragma unroll
    for (u32 i = 0; i < BATCH; i++) {
      if (!is_read(i)) continue;
      float& of_row = square[(first + i) / OF_ROW < ROWS ? (first + i) / OF_ROW : 0];
      if (FLAGS & NORM) {
        v[i].a = weighted(v[i].a, weight[i].x, of_row);
        v[i].b = weighted(v[i].b, weight[i].y, of_row);
      }
      *reinterpret_cast<uint2*>(to + (first + i) / OF_ROW * P::X_PITCH + (first + i) % OF_ROW * 256) =
          make_uint2(v[i].a, v[i].b);
    }
  }
  __syncwarp();
}

// Loads a warp's columns of a chunk of x.
template <class P>
__device__ __forceinline__ void load_x(const Worker& w, u32 chunk, Four (&x)[P::PIECES]) {
  const u32 g = w.lane / 4;
#pragma unroll
  for (u32 piece = 0; piece < P::PIECES; piece++) {
    x[piece] = Four{0, 0, 0, 0};
    if (g >= ROWS || !P::has(chunk, piece, w.warp)) continue;
    const u8* const from = place_of_x<P>(w, chunk) + g * P::X_PITCH + piece * 64;
    if (P::IS_INT4) {  // a thread has a quarter of a group, in the order of `numbers`
      const u8* const own = from - piece % 4 * 64 + w.lane % 4 * 64 + piece % 4 * 8;
      const uint2 low = *reinterpret_cast<const uint2*>(own), high = *reinterpret_cast<const uint2*>(own + 32);
      x[piece] = Four{low.x, low.y, high.x, high.y};
    } else {
      x[piece] = load_four(from + w.lane % 4 * 16);
    }
  }
  __syncwarp();
}

// Waits for the next stage and loads from it. Returns the barrier that frees its place.
template <class P>
__device__ __forceinline__ u32 load_stage(Worker& w, Piece<P>& to, u32 chunk, u32 stage) {
  constexpr u32 OF_WARP = P::IS_INT4 ? GROUP_COLUMNS / 2 : 4 * P::BITS_EACH;  // bytes, and of a thread
  const u32 at = w.stage.at * STAGE_BYTES + w.lane / 4 * P::PITCH + w.warp * OF_WARP + w.lane % 4 * (OF_WARP / 4);
  const u8* const from = shared<u8>(at);
  const u32 place = empty_barrier(w.stage.at);
  wait_for(full_barrier(w.stage.at), w.stage.parity);
#pragma unroll
  for (u32 i = 0; i < P::TURNS; i++) {
    constexpr u32 OF_PIECE = WORKERS * P::BITS_EACH / 8, UPPER = 8 * P::PITCH;
    if constexpr (P::IS_INT4) {
      if (i % 4) continue;
      const bool is_there = P::has(chunk, stage * P::TURNS + i, w.warp);
      load_group(to.lower + i, from + i * OF_PIECE, is_there);
      if (!P::IS_HALF) load_group(to.upper + i, from + UPPER + i * OF_PIECE, is_there);
    } else {
      to.lower[i] = {};
      if (!P::IS_HALF) to.upper[i] = {};
      if (!P::has(chunk, stage * P::TURNS + i, w.warp)) continue;
      load(to.lower[i], from + i * OF_PIECE);
      if (!P::IS_HALF) load(to.upper[i], from + UPPER + i * OF_PIECE);
    }
  }
  w.stage.advance(STAGES);
  return place;
}

// Sums of a thread's weight rows g and g + 8 with rows 2t and 2t + 1 of x, over a warp's columns of a stage.
// tile: of AT_ONCE.
template <class P, u32 FLAGS>
__device__ __forceinline__ void multiply_stage(const Worker& w, float (&acc)[4][4], const Piece<P>& by,
                                               const Four (&x)[P::PIECES], u32 stage, u32 tile,
                                               const Scales<P, FLAGS>& scales, const GroupSums<P>& x_sums) {
  float part[2][4];
#pragma unroll
  for (u32 i = 0; i < P::TURNS; i++) {
    const u32 piece = stage * P::TURNS + i;
    const Four low = in_bf16(by.lower[i]), own = x[piece];
    Four high = Four{0, 0, 0, 0};
    if (!P::IS_HALF) high = in_bf16(by.upper[P::IS_HALF ? 0 : i]);
    if (!Scales<P, FLAGS>::HAS) {
      multiply(acc[i % 2 * 2], low.a, high.a, low.b, high.b, own.a, own.b);
      multiply(acc[i % 2 * 2 + 1], low.c, high.c, low.d, high.d, own.c, own.d);
      continue;
    }
    // pieces that share a scale: four of integers
    constexpr u32 EACH = P::IS_INT4 ? 4 : 1;
#pragma unroll
    for (int k = 0; k < 4 && i % EACH == 0; k++) part[0][k] = part[1][k] = 0;
    multiply(part[0], low.a, high.a, low.b, high.b, own.a, own.b);
    multiply(part[P::IS_INT4], low.c, high.c, low.d, high.d, own.c, own.d);
    if (i % EACH + 1 < EACH) continue;
#pragma unroll
    for (u32 h = 0; h < (P::IS_HALF ? 1 : 2); h++) {
      const float scale = scales.of(w, tile, piece, h);
      const float offset = GroupSums<P>::HAS ? scales.offset_of(w, tile, piece, h) : 0;
#pragma unroll
      for (u32 j = 0; j < 2; j++) {
        float& to = acc[i / EACH % 4][2 * h + j];
        to += scale * (P::IS_INT4 ? part[0][2 * h + j] + part[1][2 * h + j] : part[0][2 * h + j]);
        if (GroupSums<P>::HAS) to += offset * x_sums.of[piece / 4][j];
      }
    }
  }
}

// Multiplies `num` tiles by a chunk of x. A warp's sums of a tile go to `to`,
// SUMS_OF_TILE apart.
template <class P, u32 FLAGS>
__device__ __forceinline__ void multiply_tiles(Worker& w, const Four (&x)[P::PIECES],
                                               const Scales<P, FLAGS>& scales, const GroupSums<P>& x_sums,
                                               u32 chunk, u32 num, float4* to) {
  Piece<P> next;
  u32 place = load_stage(w, next, chunk, 0);
  for (u32 tile = 0; tile < num; tile++, to += SUMS_OF_TILE) {
    float acc[4][4] = {};
#pragma unroll
    for (u32 stage = 0; stage < P::NUM_STAGES; stage++) {
      if (!P::has_stage(chunk, stage)) continue;
      const Piece<P> piece = next;
      const u32 loaded = place;
      if (P::has_stage(chunk, stage + 1))
        place = load_stage(w, next, chunk, stage + 1);
      else if (tile + 1 < num)
        place = load_stage(w, next, chunk, 0);
      multiply_stage(w, acc, piece, x, stage, tile, scales, x_sums);
      __syncwarp();
      if (ALL_ARRIVE || w.lane == 0) arrive(loaded);
    }
    if (w.lane % 4 >= COLUMN_PAIRS) continue;
    float4 sum = make_float4(0, 0, 0, 0);
    if (P::CHUNKS > 1 && chunk) sum = *to;
#pragma unroll
    for (int i = 0; i < 4; i++)
      sum.x += acc[i][0], sum.y += acc[i][1], sum.z += acc[i][2], sum.w += acc[i][3];
    *to = sum;
  }
}

// Where a thread's results go, and what is added to them: of the weight rows g and g + 8, whose
// neighbours it stores too, and of the rows 2t and 2t + 1 of x.
struct Results {
  u32 at[2][2];  // pairs of numbers from the first on
  Pair residual[2][2];
  float bias[2];   // of the products that may have one
  float scale[2];  // of rows in fp8 without blocks
};

// Whether a product may have a bias: those by the code for queries, keys and values.
template <u32 FLAGS>
constexpr bool MAY_HAVE_BIAS = QKV_BIAS && (FLAGS & (NORM | SILU | LOGITS | OF_INT4)) == NORM;
template <u32 FLAGS>
constexpr bool HAS_ROW_SCALES = FLAGS & OF_FP8 && !BLOCK;

template <u32 FLAGS>
__device__ __forceinline__ bool has_result(const Worker& w, u32 tile, int h, int j) {
  const u32 token = w.lane % 4 * 2 + j;
  if (FLAGS & EXPERT && ROWS > 1 && token != token_of<FLAGS>(tile)) return false;
  return (j == 0 || ROWS > 1) && token < ROWS && !(w.lane & 4) && !(h && FLAGS & (SILU | HALF));
}

// Of a tile; loads residuals, which have been there since the last phase but one.
template <u32 FLAGS>
__device__ __forceinline__ void prepare(const Worker& w, const Task& t, u32 tile, bool is_real,
                                        u32 num_outs, Results& r) {
  if (MAY_HAVE_BIAS<FLAGS>) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 out = (FLAGS & HALF ? tile * 8 : tile * 16 + 8 * h) + w.lane / 4;
      r.bias[h] = is_real && t.q_norm && !(h && FLAGS & HALF) ? of_bf16(t.q_norm[out]) : 0;
    }
  }
  if (HAS_ROW_SCALES<FLAGS>) {
    r.scale[0] = is_real ? scale_at(t.k_norm, lower_row<FLAGS>(tile) + w.lane / 4) : 0;
    if (!(FLAGS & HALF))
      r.scale[1] = is_real ? scale_at(t.k_norm, upper_row<FLAGS>(tile, num_outs) + w.lane / 4) : 0;
  }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (!is_real || !has_result<FLAGS>(w, tile, h, j)) continue;
      const u32 out = (FLAGS & (SILU | HALF) ? tile * 8 : tile * 16 + 8 * h) + w.lane / 4;
      // tiles of experts are of all tokens, one after the other
      r.at[h][j] = ((FLAGS & EXPERT ? 0 : (w.lane % 4 * 2 + j) * num_outs) + out) / 2;
      if (FLAGS & ADD) r.residual[h][j] = load_words(w.a.words + t.add_at + (r.at[h][j] & ~1u));
    }
}

// Stores a result for readers behind the step, at `at` pairs of numbers of all rows.
__device__ __forceinline__ void keep(const Worker& w, const Task& t, u32 num_outs, u32 at, u32 word) {
  const u64 row = 2 * at / num_outs, column = 2 * at % num_outs;
  reinterpret_cast<u32*>(const_cast<u8*>(t.second_input))[(row * w.a.kept_stride + column) / 2] = word;
}

// Finishes a tile, of whose sums the first warp's are at `from`.
template <u32 FLAGS>
__device__ __forceinline__ void finish(Worker& w, const Task& t, u32 num_outs, u32 tile, const float4* from,
                                       Results& r) {
  const int thread = w.lane % 4;
  float sum[4] = {0, 0, 0, 0}, factor[2] = {1, 1};
  if (thread < COLUMN_PAIRS) {
#pragma unroll
    for (int k = 0; k < WARPS; k++) {
      const float4 one = from[k * (8 * COLUMN_PAIRS)];
      sum[0] += one.x, sum[1] += one.y, sum[2] += one.z, sum[3] += one.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (HAS_ROW_SCALES<FLAGS> && !(i > 1 && FLAGS & HALF))
        sum[i] *= r.scale[i / 2];
      else if (FLAGS & OF_INT4)
        sum[i] *= 0x1p20f;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (!(FLAGS & NORM) || 2 * thread + j >= ROWS) continue;
      float square = 0;
#pragma unroll
      for (int k = 0; k < WARPS; k++) square += shared<float>(AT_SQUARES)[(2 * thread + j) * WARPS + k];
      factor[j] = rsqrtf(square / HIDDEN + w.a.eps);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (h && FLAGS & (SILU | HALF)) continue;
#pragma unroll
    for (int j = 0; j < (ROWS > 1 ? 2 : 1); j++) {
      float low = sum[2 * h + j] * factor[j];
      low = rounded(MAY_HAVE_BIAS<FLAGS> ? low + r.bias[h] : low);
      if (FLAGS & SILU)
        low = rounded(__fdividef(low, 1.0f + __expf(-low))) * rounded(sum[2 + j] * factor[j]);
      if (FLAGS & EXPERT && FLAGS & SILU) low *= share_of(tile);
      float high = __shfl_xor_sync(0xffffffff, low, 4);  // of the next weight row
      if (!has_result<FLAGS>(w, tile, h, j)) continue;
      if (FLAGS & ADD) {
        Pair& v = r.residual[h][j];
        if (difference(v, w.base + t.add_phase)) {
          Pair again[1];
          fetch(
              w, again, t.add_phase, [](int) { return true; },
              [&](int) { return w.a.words + t.add_at + (r.at[h][j] & ~1u); });
          v = again[0];
        }
        const u32 word = r.at[h][j] & 1 ? v.b : v.a;
        low = rounded(low) + low_of(word), high = rounded(high) + high_of(word);
      }
      const u32 word = to_bf16_pair(low, high);
      if (FLAGS & LOGITS)
        reinterpret_cast<u32*>(w.a.logits)[r.at[h][j]] = word;
      else
        store_word(w.a.words + t.out_at + r.at[h][j], word, w.base + t.out_phase);
      if (KEEPS && FLAGS & ADD && t.second_input) keep(w, t, num_outs, r.at[h][j], word);
    }
  }
}

// The tiles of a task, AT_ONCE at a time: all warps multiply these, then the first finish one each.
template <u32 DEPTH, u32 FLAGS>
__device__ __forceinline__ void product(Worker& w) {
  using P = Of<DEPTH, FLAGS>;
  const Task t = *w.task;  // in registers: shared memory would be read again after each store
  const u32 num_outs = t.num_outs, place = w.lane / 4 * COLUMN_PAIRS + w.lane % 4;
  Four x[P::PIECES];
  GroupSums<P> x_sums;
  Scales<P, FLAGS> next;
  if (FLAGS & EXPERT && next.HAS) wait_for(full_barrier(w.stage.at), w.stage.parity);  // they are chosen then
  next.load(w, t, 0, t.first);
  for (u32 first = 0; first < t.count; first += AT_ONCE, w.turn ^= 1) {
    const u32 num = t.count - first < AT_ONCE ? t.count - first : AT_ONCE;
    Results results;
    prepare<FLAGS>(w, t, t.first + first + w.warp, w.warp < (int)num, num_outs, results);
    float4* const sums = shared<float4>(AT_SUMS) + w.turn * (AT_ONCE * SUMS_OF_TILE);
    float square[ROWS] = {};
    for (u32 chunk = 0; chunk < P::CHUNKS; chunk++) {
      if (P::CHUNKS > 1 || first == 0) {
        if (!P::IS_RESIDENT)
          fetch_x<DEPTH, FLAGS>(w, t, chunk, square);
        else if (first == 0 && chunk == 0)
#pragma unroll 1
          for (u32 each = 0; each < P::CHUNKS; each++) fetch_x<DEPTH, FLAGS>(w, t, each, square);
        load_x<P>(w, chunk, x);
        x_sums.add_up(x);
        note(w, ARRIVED);
        if (FLAGS & NORM && first == 0 && chunk + 1 == P::CHUNKS) {
#pragma unroll
          for (int row = 0; row < ROWS; row++) {
#pragma unroll
            for (int i = 16; i; i /= 2) square[row] += __shfl_xor_sync(0xffffffff, square[row], i);
            if (w.lane == 0) shared<float>(AT_SQUARES)[row * WARPS + w.warp] = square[row];
          }
        }
        note(w, READY);
      }
      const Scales<P, FLAGS> scales = next;
      if (chunk + 1 < P::CHUNKS)
        next.load(w, t, chunk + 1, t.first + first);
      else if (first + AT_ONCE < t.count)
        next.load(w, t, 0, t.first + first + AT_ONCE);
      float4* const own = sums + w.warp * (8 * COLUMN_PAIRS) + place;
      multiply_tiles(w, x, scales, x_sums, chunk, num, own);
    }
    meet();
    note(w, COMPUTED);
    if (w.warp < (int)num)
      finish<FLAGS>(w, t, num_outs, t.first + first + w.warp, sums + w.warp * SUMS_OF_TILE + place, results);
  }
}
