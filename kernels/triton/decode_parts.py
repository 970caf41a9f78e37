"""Results of decode attention over a part of a row, and their merge: device functions in Triton.

A row that lies within one worker's span (`attention_decode.py`) is written directly. A row that
crosses span borders leaves one partial result per span, and the last of its workers to arrive
merges them in the order of the spans. So the result depends on the lengths only, not on timing.

Shapes: N query heads | K key-value heads | G = N / K query heads per key-value head | M = G padded
for the matrix units | H head size | W workers per key-value head. A name's suffix gives its shape;
"p" after a letter: padded to a power of two.
"""

import triton
import triton.language as tl

from nanovllm.kernels.triton.common import NO_SCORE, load_sinks


@triton.jit
def store_result(acc_MHp, max_M, sum_M, v_scale, row_idx, row_begin, row_end, span_begin, span_end,
                 out_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, out_at_MHp, part_at_MHp, mask_MHp,
                 q_head_M, SLOT: tl.constexpr, GROUP: tl.constexpr, GROUP_M: tl.constexpr,
                 HEAD_P: tl.constexpr, FP8: tl.constexpr, HAS_SINKS: tl.constexpr):  # fmt: skip
    """Stores the result of a row if it lies within the span, else of the span's part of it.

    A part has no share of the sink: see `_merge`.
    """
    safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    out_MHp = acc_MHp / safe_sum_M[:, None]
    if FP8:
        out_MHp *= v_scale
    if (row_begin >= span_begin) & (row_end <= span_end):
        if HAS_SINKS:
            is_head_M = tl.arange(0, GROUP_M) < GROUP
            sink_M = load_sinks(sinks_ptr + q_head_M, is_head_M)
            out_MHp *= (safe_sum_M / (safe_sum_M + tl.exp2(sink_M - max_M)))[:, None]
        out_at = out_ptr + row_idx * SLOT + out_at_MHp
        tl.store(out_at, out_MHp.to(out_ptr.dtype.element_ty), mask=mask_MHp)
    else:
        # slot 1 holds the beginning of a row (at most one a worker), slot 0 its continuation
        part_at = tl.where(row_begin >= span_begin, SLOT, 0) + part_at_MHp
        lse_MHp = tl.broadcast_to((max_M + tl.log2(safe_sum_M))[:, None], [GROUP_M, HEAD_P])
        tl.store(part_out_ptr + part_at, out_MHp, mask=mask_MHp)
        tl.store(part_lse_ptr + part_at, lse_MHp, mask=mask_MHp)


@triton.jit
def _merge(
    part_out_ptr,  # [W, 2, K, G, H]
    part_lse_ptr,  # [W, 2, K, G, H]
    sinks_ptr,  # [N], read if HAS_SINKS
    out_ptr,  # this row's and key-value head's [G, H]
    head_idx,
    first_worker,
    num_parts,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """out = Σ 2^lse_i · out_i / Σ 2^lse_i over the parts. PARTS of them are loaded at a time.
    A sink joins the second sum.

    All operations are elementwise in [G, H] (the lse is stored once per element), so no thread
    waits for another.
    """
    group_Gp = tl.arange(0, GROUP_P)
    h_Hp = tl.arange(0, HEAD_P)
    mask_GpHp = (group_Gp < GROUP)[:, None] & (h_Hp < HEAD)[None, :]
    at_GpHp = group_Gp[:, None] * HEAD + h_Hp[None, :]
    SLOT: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD
    max_GpHp = tl.full([GROUP_P, HEAD_P], NO_SCORE, tl.float32)
    sum_GpHp = tl.zeros([GROUP_P, HEAD_P], tl.float32)
    acc_GpHp = tl.zeros([GROUP_P, HEAD_P], tl.float32)
    for first_part in range(0, num_parts, PARTS):
        lses, outs = (), ()
        for i in tl.static_range(PARTS):
            part = first_part + i
            # the first part begins the row (slot 1), the others continue it (slot 0)
            base = (
                (first_worker + part) * (2 * SLOT)
                + head_idx * (GROUP * HEAD)
                + tl.where(part == 0, SLOT, 0)
            )
            mask = mask_GpHp & (part < num_parts)
            # other multiprocessors wrote these, so .cg bypasses L1
            lse = tl.load(
                part_lse_ptr + base + at_GpHp, mask=mask, other=NO_SCORE, cache_modifier=".cg"
            )
            out = tl.load(part_out_ptr + base + at_GpHp, mask=mask, other=0.0, cache_modifier=".cg")
            lses, outs = lses + (lse,), outs + (out,)  # noqa: RUF005 (Triton has no unpacking)
        new_max_GpHp = max_GpHp
        for i in tl.static_range(PARTS):
            new_max_GpHp = tl.maximum(new_max_GpHp, lses[i])
        alpha_GpHp = tl.exp2(max_GpHp - new_max_GpHp)
        sum_GpHp *= alpha_GpHp
        acc_GpHp *= alpha_GpHp
        for i in tl.static_range(PARTS):
            weight_GpHp = tl.exp2(lses[i] - new_max_GpHp)
            sum_GpHp += weight_GpHp
            acc_GpHp += weight_GpHp * outs[i]
        max_GpHp = new_max_GpHp
    if HAS_SINKS:
        sink_Gp = load_sinks(sinks_ptr + head_idx * GROUP + group_Gp, group_Gp < GROUP)
        sum_GpHp += tl.exp2(sink_Gp[:, None] - max_GpHp)
    tl.store(out_ptr + at_GpHp, (acc_GpHp / sum_GpHp).to(out_ptr.dtype.element_ty), mask=mask_GpHp)


@triton.jit
def _worker_of(tile_idx, num_long, tiles_per_worker):
    """The worker whose span holds a tile. The first num_long workers have one tile more."""
    long_tiles = num_long * (tiles_per_worker + 1)
    return tl.where(
        tile_idx < long_tiles,
        tile_idx // (tiles_per_worker + 1),
        num_long + (tile_idx - long_tiles) // tiles_per_worker,
    )


@triton.jit
def report_part(row_idx, row_begin, row_end, num_long, tiles_per_worker, head_idx, arrived_ptr,
                part_out_ptr, part_lse_ptr, sinks_ptr, out_ptr, NUM_KV_HEADS: tl.constexpr,
                GROUP: tl.constexpr, GROUP_P: tl.constexpr, HEAD: tl.constexpr,
                HEAD_P: tl.constexpr, PARTS: tl.constexpr, HAS_SINKS: tl.constexpr):  # fmt: skip
    """Counts this worker among those of a row. The last of them merges the parts."""
    first_worker = _worker_of(row_begin, num_long, tiles_per_worker)
    num_parts = _worker_of(row_end - 1, num_long, tiles_per_worker) - first_worker + 1
    # all threads store before the one thread's release; its acquire comes before all loads
    tl.debug_barrier()
    arrived_at = arrived_ptr + first_worker * NUM_KV_HEADS + head_idx
    num_before = tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu")
    if num_before == num_parts - 1:
        tl.store(arrived_at, 0)
        _merge(
            part_out_ptr, part_lse_ptr, sinks_ptr,
            out_ptr + (row_idx * NUM_KV_HEADS + head_idx) * (GROUP * HEAD),
            head_idx, first_worker, num_parts,
            NUM_KV_HEADS, GROUP, GROUP_P, HEAD, HEAD_P, PARTS, HAS_SINKS,
        )  # fmt: skip
