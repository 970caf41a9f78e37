// The copying warps of persistent.cu: weights, and keys and values of earlier tokens, into the ring.

#define SCALE_BYTES (SCALE ? 2 : 4)

// Waits until the stage that was begun `num` before one has been copied.
__device__ __forceinline__ bool is_copied(const Ring& stage, u32 num) {
  const bool is_back = stage.at < num;  // it is of the turn before
  // a turn's parity is that of `empty`, inverted
  return (stage.turn == 0 && is_back) ||
         is_done(full_barrier(stage.at + (is_back ? STAGES : 0) - num), stage.parity ^ 1 ^ is_back);
}

// A copying warp's rows of a stage: each of its first `num` threads copies one.
struct Rows {
  u32 first, num;
  __device__ __forceinline__ Rows(const Worker& w, u32 of_stage)
      : first((w.warp - WARPS) * (of_stage / COPIERS)), num(of_stage / COPIERS) {}
};

// Waits for a place in the ring, and until no more than IN_FLIGHT - 1 stages are on their way, or
// WAITING_IN_FLIGHT - 1 while results are waited for: they would queue behind the copies. The first of
// the copying warps says how many bytes all of them copy: some may have arrived before.
__device__ __forceinline__ void begin_stage(const Worker& w, u32 num_bytes) {
  const Ring& stage = w.stage;
  wait_for(empty_barrier(stage.at), stage.parity);
  while (!is_copied(stage, IN_FLIGHT)) {}
  volatile int* const is_waiting = shared<volatile int>(AT_LENS) + 9;
  while (WAITING_IN_FLIGHT < IN_FLIGHT && *is_waiting && !is_copied(stage, WAITING_IN_FLIGHT)) {}
  if (w.warp == WARPS && w.lane == 0) expect(full_barrier(stage.at), num_bytes);
  __syncwarp();
}

// Fetches the scales of a row's columns in a stage into the second-level cache, where they are once the
// stage has been copied. A copy to shared memory would take the copying unit as long as one of 1,024 bytes.
__device__ __forceinline__ void prefetch_scales(const Task& t, u32 tile, u32 idx, u32 row, u32 column, u32 end) {
  const u8* const scales = reinterpret_cast<const u8*>(t.k_norm);
  if (t.flags & OF_INT4) {
    const u64 at = (u64)row * (t.depth / GROUP_COLUMNS) + column / GROUP_COLUMNS;
    prefetch(scales + at * 2);
    if (OFFSET) prefetch(t.q_norm + at);
  } else if (t.flags & OF_FP8 && !BLOCK) {
    prefetch(scales + row * SCALE_BYTES);
  } else if (t.flags & OF_FP8) {  // rows share blocks, so each has one of eight
    constexpr u32 SIDE = BLOCK ? BLOCK : 1;
    const u32 own = column + idx % 8 * SIDE;
    if (own >= end) return;
    u32 at = row / SIDE * ((t.depth + SIDE - 1) / SIDE) + own / SIDE;
    if (EXPERTS && t.flags & EXPERT)
      at = t.flags & SILU ? expert_block<SILU>(tile, own, idx >= 8)
                          : expert_block<DOWN_HALF ? HALF : 0>(tile, own, false);
    prefetch(scales + at * SCALE_BYTES);
  }
}

__device__ __forceinline__ void copy_weights(Worker& w) {
  const Task& t = *w.task;
  Ring& stage = w.stage;
  const u32 ring = shared_address(shared<u8>(0));
  constexpr bool HAS_CODES = LAYER_BITS < 16 || HEAD_BITS < 16;
  const u32 bits = !HAS_CODES ? 16 : t.flags & OF_INT4 ? 4 : t.flags & OF_FP8 ? 8 : 16;
  const u32 of_stage = t.flags & HALF ? 8 : 16;
  const u32 row_bytes = WIDE * 2 * (16 / of_stage), wide = row_bytes * 8 / bits;
  const u32 pitch = row_bytes + ROW_END(t.flags);
  const Rows rows(w, of_stage);
  const u32 idx = rows.first + w.lane;
  const u32 upper = t.flags & SILU ? t.num_outs : 8;
  const u32 end = t.first + t.count, chunk = t.depth == HIDDEN ? chunk_of(HIDDEN)
                                             : t.depth == FFN  ? chunk_of(FFN)
                                                               : chunk_of(HEADS * HEAD);
  // the order in which `product` needs them
  for (u32 first = t.first; first < end; first += AT_ONCE)
    for (u32 from_column = 0; from_column < t.depth; from_column += chunk)
      for (u32 tile = first; tile < end && tile < first + AT_ONCE; tile++) {
        const u32 row =
            (t.flags & (SILU | HALF) ? tile * 8 : tile * 16) + idx % 8 + (idx < 8 ? 0 : upper);
        const bool is_of_parts = EXPERTS && (t.flags & (EXPERT | SILU)) == EXPERT;
        const u8* from = t.first_input + (u64)row * t.depth * bits / 8;
        if (EXPERTS && t.flags & EXPERT) from = expert_row(t, tile, idx);
        const u32 to_column = t.depth < from_column + chunk ? t.depth : from_column + chunk;
        for (u32 column = from_column; column < to_column; column += wide) {
          const u32 num = to_column - column < wide ? to_column - column : wide, num_bytes = num * bits / 8;
          begin_stage(w, num_bytes * of_stage);
          const u32 to = ring + stage.at * STAGE_BYTES + idx * pitch;
          if (HAS_CODES && w.lane < rows.num) prefetch_scales(t, tile, idx, row, column, column + num);
          if (w.lane < rows.num && is_of_parts)
            copy_parts(to, from, tile, column, num_bytes, full_barrier(stage.at));
          else if (w.lane < rows.num)
            copy(to, from + column * bits / 8, num_bytes, full_barrier(stage.at));
          stage.advance(STAGES);
        }
      }
}

__device__ __forceinline__ void copy_keys(Worker& w) {
  const Args& a = w.a;
  const Task& t = *w.task;
  Ring& stage = w.stage;
  const u32 ring = shared_address(shared<u8>(0));
  const Rows rows(w, TOKENS);
  const u32 idx = rows.first + w.lane;
  for (u32 unit = t.first; unit < t.first + t.count; unit++) {
    const Unit u = unit_of(unit);
    if (!u.is_real) continue;
    for (u32 token = u.from; token < u.to; token += TOKENS) {
      const u32 num = u.to - token < TOKENS ? u.to - token : TOKENS;
      const bool is_mine = w.lane < rows.num && idx < num;
      u64 at = 0;
      if (is_mine) {
        const u32 key = token + idx;
        const u64 block = a.table[(u64)u.row * a.table_stride + key / a.block_size];
        at = block * a.block_stride + key % a.block_size * a.slot_stride + u.head * a.head_stride;
      }
      begin_stage(w, num * HEAD * 4);
      const u32 to = ring + stage.at * STAGE_BYTES + idx * HEAD * 2;
      if (is_mine) {
        copy(to, t.first_input + at * 2, HEAD * 2, full_barrier(stage.at));
        copy(to + TOKENS * HEAD * 2, t.second_input + at * 2, HEAD * 2, full_barrier(stage.at));
      }
      stage.advance(STAGES);
    }
  }
}
