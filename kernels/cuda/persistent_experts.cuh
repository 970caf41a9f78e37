// Experts of persistent.cu: which ones a token chooses, by the router's results.
//
// A product with the flag EXPERT is of the experts of all tokens. The experts of a token are one MLP of
// FFN columns: those of its first expert, then those of the next. The inside of each is multiplied by
// the expert's weight, so the last product adds the experts up.

// The largest in a warp.
__device__ __forceinline__ u32 most_of_warp(u32 v) {
  u32 r;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
  return r;
}

// A number in bf16 as one that has the same order as an integer, and back.
__device__ __forceinline__ u32 in_order(u32 bits) { return bits & 0x8000 ? 0xffff & ~bits : bits | 0x8000; }
__device__ __forceinline__ u32 of_order(u32 order) { return order & 0x8000 ? order & 0x7fff : 0xffff & ~order; }

// Waits for the router's results, and chooses the TOP_K experts of each token, the smaller number among
// equals. By a warp, whose thread k has a token's k-th expert.
__device__ __forceinline__ void choose_experts(Worker& w) {
  constexpr u32 LOADS = EXPERTS / 4, EACH = (LOADS + 31) / 32 ? (LOADS + 31) / 32 : 1;  // of four numbers
  const Task& t = *w.task;
  for (u32 row = 0; row < ROWS; row++) {
    const u64* const words = w.a.words + t.add_at + row * (EXPERTS / 2) + w.lane * 2;
    const auto is_read = [&](u32 i) { return i * 32 + w.lane < LOADS; };
    Pair v[EACH];
    fetch(w, v, t.add_phase, is_read, [&](u32 i) { return words + i * 64; });
    __syncwarp();
    u32 key[4 * EACH], mine = 0, first = 0;  // an expert's number is less than 65,536
#pragma unroll
    for (u32 i = 0; i < 4 * EACH; i++) {
      const u32 word = i % 4 < 2 ? v[i / 4].a : v[i / 4].b, number = (i / 4 * 32 + w.lane) * 4 + i % 4;
      key[i] = is_read(i / 4) ? in_order(i % 2 ? word >> 16 : word & 0xffff) << 16 | 0xffff - number : 0;
    }
    float sum = 0;
    for (u32 k = 0; k < TOP_K; k++) {
      u32 most = 0;
#pragma unroll
      for (u32 i = 0; i < 4 * EACH; i++) most = key[i] > most ? key[i] : most;
      most = most_of_warp(most);
      if (k == 0) first = most;
      if (w.lane == k) mine = most;
      if (k == 0 && !NORMALIZE) {
#pragma unroll
        for (u32 i = 0; i < 4 * EACH; i++)
          if (key[i]) sum += __expf(of_bf16(of_order(key[i] >> 16)) - of_bf16(of_order(first >> 16)));
      }
#pragma unroll
      for (u32 i = 0; i < 4 * EACH; i++) key[i] = key[i] == most ? 0 : key[i];
    }
    const float share =
        w.lane < TOP_K ? __expf(of_bf16(of_order(mine >> 16)) - of_bf16(of_order(first >> 16))) : 0;
    if (NORMALIZE) sum = share;
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
    if (w.lane < TOP_K) {
      const u32 number = 0xffff - (mine & 0xffff), at = row * TOP_K + w.lane;
      shared<u32>(AT_CHOSEN)[at] = number < EXPERTS ? number : 0;
      shared<float>(AT_SHARES)[at] = share / sum;
    }
  }
  __syncwarp();  // tasks find these once a stage has been copied
}

#define DOWN_ROWS (DOWN_HALF ? 8 : 16)  // of a tile of the experts' last product
#define EXPERT_SIZE (LAYER_BITS / 8)    // of a number

// Where a row of a tile of experts begins: of their last product, without the expert's own place.
__device__ __forceinline__ const u8* expert_row(const Task& t, u32 tile, u32 idx) {
  if (!(t.flags & SILU)) {
    const u32 row = tile % (HIDDEN / DOWN_ROWS) * DOWN_ROWS + idx;
    return t.first_input + (u64)row * (EXPERT_FFN * EXPERT_SIZE);
  }
  const u32 expert = shared<u32>(AT_CHOSEN)[tile / (EXPERT_FFN / 8)];
  const u32 row = tile % (EXPERT_FFN / 8) * 8 + idx % 8 + (idx < 8 ? 0 : EXPERT_FFN);
  return t.first_input + ((u64)expert * (2 * EXPERT_FFN) + row) * (HIDDEN * EXPERT_SIZE);
}

// Copies columns of a row of the experts' last product: each expert of a token has some.
__device__ __forceinline__ void copy_parts(u32 to, const u8* row, u32 tile, u32 column, u32 num_bytes,
                                           u32 barrier) {
  const u32* const chosen = shared<u32>(AT_CHOSEN) + tile / (HIDDEN / DOWN_ROWS) * TOP_K;
  constexpr u32 ROW_BYTES = EXPERT_FFN * EXPERT_SIZE;
  u32 k = column / EXPERT_FFN, from = column % EXPERT_FFN * EXPERT_SIZE;
  for (; num_bytes; k++, from = 0) {
    const u32 part = num_bytes < ROW_BYTES - from ? num_bytes : ROW_BYTES - from;
    copy(to, row + (u64)chosen[k] * ((u64)HIDDEN * ROW_BYTES) + from, part, barrier);
    to += part, num_bytes -= part;
  }
}

// Of weights in fp8, the number of the scale of a tile's row and a column, of `upper` the gate's other half.
template <u32 FLAGS>
__device__ __forceinline__ u32 expert_block(u32 tile, u32 column, bool upper) {
  constexpr u32 SIDE = BLOCK ? BLOCK : 1, ROWS_EACH = FLAGS & HALF ? 8 : 16;
  const u32* const chosen = shared<u32>(AT_CHOSEN);
  if (FLAGS & SILU) {
    const u32 row = tile % (EXPERT_FFN / 8) * 8 + (upper ? EXPERT_FFN : 0);
    const u32 expert = chosen[tile / (EXPERT_FFN / 8)];
    return (expert * (2 * EXPERT_FFN / SIDE) + row / SIDE) * (HIDDEN / SIDE) + column / SIDE;
  }
  const u32 token = tile / (HIDDEN / ROWS_EACH), row = tile % (HIDDEN / ROWS_EACH) * ROWS_EACH;
  const u32 expert = chosen[token * TOP_K + column / EXPERT_FFN];
  return (expert * (HIDDEN / SIDE) + row / SIDE) * (EXPERT_FFN / SIDE) + column % EXPERT_FFN / SIDE;
}

// Of a tile of a product of experts, the token, and the weight of its expert.
template <u32 FLAGS>
__device__ __forceinline__ u32 token_of(u32 tile) {
  return FLAGS & SILU ? tile / (FFN / 8) : tile / (HIDDEN / (FLAGS & HALF ? 8 : 16));
}
__device__ __forceinline__ float share_of(u32 tile) {
  return shared<float>(AT_SHARES)[tile / (EXPERT_FFN / 8)];
}
