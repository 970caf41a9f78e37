"""Paged attention for prefill on Hopper (sm_90), in Gluon: heads of 128, no window, no fp8 cache.

The algorithm is FlashAttention-3's (Shah et al. 2024, https://arxiv.org/abs/2407.08608) over packed
queries and a paged cache. A program takes 128 entries of a row's queries for one key-value head, as
`attention_prefill` does. One warp copies tiles of 128 keys and of values to shared memory with the
copy engine. Two groups of four warps take 64 entries each. A group multiplies its last
probabilities by values while it computes the next ones, and the groups issue their products in
turn, so that one computes exponentials while the other multiplies. Tiles are taken from the last
to the first: the masked ones come first.

`suits` selects these calls; `attention_prefill` takes all others. Gluon has no interpreter.

Shapes: T tokens | R rows | P blocks per row | C blocks in the cache | B block size in tokens | N
query heads | K key-value heads | H head size | M entries of a group of warps: tokens · N / K | S
keys in a tile. A name's suffix gives its shape; "p" after a letter: padded to a power of two.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.triton.common import LOG2_E, launch_options, padded_rows

HEAD = gl.constexpr(128)
TILE = gl.constexpr(128)  # keys
HALF = gl.constexpr(64)  # entries of a group of warps
STAGES = gl.constexpr(2)  # tiles of keys, and of values, in shared memory
CHUNK = gl.constexpr(64)  # columns that the copy engine swizzles at once
NO_SCORE = gl.constexpr(-1.0e30)  # as common.NO_SCORE, which is a constant of another language
# One group gets the registers that the others leave: 240, too. The copying warp needs few.
WORKER_WARPS = gl.constexpr((4, 1))
WORKER_REGISTERS = gl.constexpr((240, 24))
NUM_WARPS = 4
# Calls with shorter rows are left to `attention_prefill`: a tile has up to 64 tokens of a row.
MIN_TOKENS = 256


@gluon.jit
def _exp2(x):
    """2^x by the hardware's approximation."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _again(x):
    """x, so that the compiler does not keep what was computed from it before."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _rows(first_token, end, first_entry, head_idx, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Tokens and heads of a consumer's entries, and which exist."""
    entry_M = first_entry + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    token_M = first_token + entry_M // GROUP
    return token_M.to(gl.int64), head_idx * GROUP + entry_M % GROUP, token_M < end


@gluon.jit
def _copy(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    table_at, num_tiles, last_block, head_idx,
    BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The copying warp: tiles in the order in which they are multiplied."""
    for i in range(num_tiles + 1):
        if i < num_tiles:
            _load_tile(k_desc, k_ring, k_full, k_empty, table_at, i, num_tiles - 1 - i,
                       last_block, head_idx, BLOCK, ROWS)  # fmt: skip
        if i > 0:
            _load_tile(v_desc, v_ring, v_full, v_empty, table_at, i - 1, num_tiles - i,
                       last_block, head_idx, BLOCK, ROWS)  # fmt: skip


@gluon.jit
def _load_tile(
    desc, ring, full, empty, table_at, turn, tile_idx, last_block, head_idx,
    BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Copies a tile, once its place is free: as many pieces as the blocks it is in."""
    PIECES: gl.constexpr = TILE // ROWS
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), (turn // STAGES) & 1 ^ 1)
    mbarrier.expect(full.index(stage), TILE * HEAD * 2)
    for piece in gl.static_range(PIECES):
        key = tile_idx * TILE + piece * ROWS
        block = gl.load(table_at + gl.minimum(key // BLOCK, last_block))
        row = block * BLOCK + key % BLOCK
        for chunk in gl.static_range(2):
            tma.async_copy_global_to_shared(
                desc, [row, head_idx * HEAD + chunk * CHUNK], full.index(stage),
                ring.index((stage * 2 + chunk) * PIECES + piece),
            )  # fmt: skip


@gluon.jit
def _masked(score, first_key, query_pos_M, MMA: gl.constexpr):
    """Scores of the keys that a query attends to; −inf for the others."""
    key_S = first_key + gl.arange(0, TILE, layout=gl.SliceLayout(0, MMA))
    return gl.where(key_S[None, :] <= query_pos_M[:, None], score, float("-inf"))


@gluon.jit
def _step(
    q_smem, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    acc, prob, max_M, sum_M, query_pos_M, turn, num_tiles, scale_log2,
    order, MASKED: gl.constexpr, MMA: gl.constexpr, P_LAYOUT: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Scores of tile `turn`, while the values of the tile before are multiplied."""
    stage = turn % STAGES
    mbarrier.wait(order.index(WHICH), (turn ^ WHICH) & 1)
    zero = gl.zeros([HALF, TILE], gl.float32, layout=MMA)
    score = warpgroup_mma(
        q_smem, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    last = (turn - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((turn - 1) // STAGES) & 1)
    acc = warpgroup_mma(prob, v_tiles.index(last), acc, is_async=True)
    mbarrier.arrive(order.index(1 - WHICH), count=1)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        score = _masked(score, (num_tiles - 1 - turn) * TILE, query_pos_M, MMA)
    new_max_M = gl.maximum(max_M, gl.max(score, 1) * scale_log2)
    alpha_M = _exp2(max_M - new_max_M)
    p = _exp2(score * scale_log2 - new_max_M[:, None])
    sum_M = sum_M * alpha_M + gl.sum(p, 1)
    new_prob = gl.convert_layout(p.to(prob.dtype), P_LAYOUT)
    # This wait has another purpose: the assembler would move the wait for the products before the
    # exponentials, but it moves nothing over a loop.
    next = turn + 1
    mbarrier.wait(k_full.index(next % STAGES), (next // STAGES) & 1, pred=next < num_tiles)
    acc, prob = warpgroup_mma_wait(0, deps=[acc, prob])
    mbarrier.arrive(v_empty.index(last), count=1)
    acc = acc * alpha_M[:, None]
    return acc, new_prob, new_max_M, sum_M


@gluon.jit
def _consume(
    q_ptr, out_ptr, q_smem, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    first_entry, first_token, end, first_pos, seq_len, num_tiles, num_masked, head_idx, scale_log2,
    Q_STRIDE_TOKEN: gl.constexpr, Q_STRIDE_HEAD: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr, order, WHICH: gl.constexpr,
):  # fmt: skip
    """A group of warps: attention of 64 entries, first_entry of the tile and those after it."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    # queries
    h_H = gl.arange(0, HEAD, layout=gl.SliceLayout(0, ROW))
    token_M, q_head_M, mask_M = _rows(first_token, end, first_entry, head_idx, GROUP, ROW)
    q_at = q_ptr + (token_M * Q_STRIDE_TOKEN + q_head_M * Q_STRIDE_HEAD)[:, None] + h_H[None, :]
    q_smem.store(gl.load(q_at, mask=mask_M[:, None], other=0.0))
    fence_async_shared()

    pos_entry_M = first_entry + gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA))
    query_pos_M = first_pos + pos_entry_M // GROUP
    max_M = gl.full([HALF], NO_SCORE, gl.float32, layout=gl.SliceLayout(1, MMA))
    sum_M = gl.zeros([HALF], gl.float32, layout=gl.SliceLayout(1, MMA))
    acc = gl.zeros([HALF, HEAD], gl.float32, layout=MMA)

    if num_tiles > 0:
        # the first tile, the last one of the row
        mbarrier.wait(k_full.index(0), 0)
        zero = gl.zeros([HALF, TILE], gl.float32, layout=MMA)
        score = warpgroup_mma(
            q_smem, k_tiles.index(0).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        score = warpgroup_mma_wait(0, deps=[score])
        mbarrier.arrive(k_empty.index(0), count=1)
        score = _masked(score, (num_tiles - 1) * TILE, query_pos_M, MMA)
        max_M = gl.maximum(max_M, gl.max(score, 1) * scale_log2)
        p = _exp2(score * scale_log2 - max_M[:, None])
        sum_M = gl.sum(p, 1)
        prob = gl.convert_layout(p.to(dtype), P_LAYOUT)
        if num_tiles * TILE > seq_len:
            # slots past the row's end may hold NaN
            mbarrier.wait(v_full.index(0), 0)
            PART: gl.constexpr = 32
            for part in gl.static_range(TILE // PART):
                v_part = v_tiles.index(0).slice(part * PART, PART)
                key_S = (num_tiles - 1) * TILE + part * PART
                key_S += gl.arange(0, PART, layout=gl.SliceLayout(1, ROW))
                v_part.store(gl.where((key_S < seq_len)[:, None], v_part.load(ROW), 0.0))
            fence_async_shared()

        mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES, pred=num_tiles > 1)
        for turn in range(1, num_masked):
            acc, prob, max_M, sum_M = _step(
                q_smem, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                acc, prob, max_M, sum_M, query_pos_M, turn, num_tiles, scale_log2,
                order, True, MMA, P_LAYOUT, WHICH,
            )  # fmt: skip
        for turn in range(num_masked, num_tiles):
            acc, prob, max_M, sum_M = _step(
                q_smem, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                acc, prob, max_M, sum_M, query_pos_M, turn, num_tiles, scale_log2,
                order, False, MMA, P_LAYOUT, WHICH,
            )  # fmt: skip
        last = (num_tiles - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((num_tiles - 1) // STAGES) & 1)
        acc = warpgroup_mma(prob, v_tiles.index(last), acc, is_async=True)
        acc, prob = warpgroup_mma_wait(0, deps=[acc, prob])

    inverse_M = 1.0 / gl.where(sum_M > 0, sum_M, 1.0)
    acc = acc * inverse_M[:, None]
    # through shared memory, so that a store writes whole rows
    q_smem.store(acc.to(dtype))
    out = q_smem.load(ROW)
    token_M, q_head_M, mask_M = _rows(_again(first_token), end, first_entry, head_idx, GROUP, ROW)
    out_at = out_ptr + ((token_M * NUM_KV_HEADS * GROUP + q_head_M) * HEAD)[:, None] + h_H[None, :]
    gl.store(out_at, out, mask=mask_M[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "num_rows", "table_stride"])
def prefill_hopper_kernel(
    q_ptr,  # [T, N, H]
    k_desc,  # [C · B, K · H], pieces of ROWS tokens and CHUNK columns
    v_desc,
    table_ptr,  # [R, P] int32
    seq_len_ptr,  # [R] int32
    q_start_ptr,  # [R + 1] int32
    out_ptr,  # [T, N, H]
    num_tokens,
    num_rows,
    table_stride,
    scale_log2,
    Q_STRIDE_TOKEN: gl.constexpr,
    Q_STRIDE_HEAD: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,  # of a block in a tile
    ROWS_P: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SMEM: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NUM_PIECES: gl.constexpr = STAGES * 2 * TILE // ROWS
    k_ring = gl.allocate_shared_memory(dtype, [NUM_PIECES, ROWS, CHUNK], SMEM)
    v_ring = gl.allocate_shared_memory(dtype, [NUM_PIECES, ROWS, CHUNK], SMEM)
    k_tiles = k_ring._reinterpret(dtype, [STAGES, TILE, HEAD], SMEM)
    v_tiles = v_ring._reinterpret(dtype, [STAGES, TILE, HEAD], SMEM)
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF, HEAD], SMEM)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    mbarrier.init(order.index(0), count=1)
    mbarrier.init(order.index(1), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    TOKENS: gl.constexpr = 2 * HALF // GROUP
    head_idx = gl.program_id(0) % NUM_KV_HEADS
    # late tiles of a row see the most keys, so they start first and the last programs are short
    tile_idx = gl.num_programs(0) // NUM_KV_HEADS - 1 - gl.program_id(0) // NUM_KV_HEADS

    # segments as in `attention_prefill.prefill_kernel`
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    segment_Rp = gl.arange(0, ROWS_P, layout=LINE)
    is_row_Rp = (segment_Rp > 0) & (segment_Rp <= num_rows)
    start_Rp = gl.load(
        q_start_ptr + segment_Rp - 1, mask=(segment_Rp > 0) & (segment_Rp < num_rows + 2), other=0
    )
    end_Rp = gl.load(q_start_ptr + segment_Rp, mask=segment_Rp <= num_rows, other=num_tokens)
    seq_len_Rp = gl.load(seq_len_ptr + segment_Rp - 1, mask=is_row_Rp, other=0)
    begun_Rp = (segment_Rp < num_rows + 2) & (start_Rp // TOKENS + segment_Rp <= tile_idx)
    segment_idx = gl.sum(begun_Rp.to(gl.int32), 0) - 1
    start = gl.sum(gl.where(segment_Rp == segment_idx, start_Rp, 0), 0)
    end = gl.sum(gl.where(segment_Rp == segment_idx, end_Rp, 0), 0)
    seq_len = gl.sum(gl.where(segment_Rp == segment_idx, seq_len_Rp, 0), 0)
    first_token = start + (tile_idx - start // TOKENS - segment_idx) * TOKENS
    if first_token >= end:
        return

    # the query of token t is at position seq_len − (end − t); a row without keys has no tile
    first_pos = seq_len - end + first_token
    last_pos = gl.minimum(first_pos + TOKENS, seq_len) - 1
    num_tiles = gl.where(seq_len > 0, (gl.maximum(last_pos + 1, 0) + TILE - 1) // TILE, 0)
    num_full = gl.minimum(gl.maximum(first_pos + 1, 0) // TILE, num_tiles)
    num_masked = gl.maximum(num_tiles - num_full, 1)
    row_idx = gl.minimum(gl.maximum(segment_idx - 1, 0), num_rows - 1)
    table_at = table_ptr + row_idx * table_stride
    last_block = (gl.maximum(seq_len, 1) - 1) // BLOCK

    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_ptr, out_ptr, q_smem.index(0), k_tiles, v_tiles, k_full, k_empty, v_full,
                    v_empty, 0, first_token, end, first_pos, seq_len, num_tiles, num_masked,
                    head_idx, scale_log2, Q_STRIDE_TOKEN, Q_STRIDE_HEAD, NUM_KV_HEADS, GROUP,
                    order, 0,
                ),
            ),
            (
                _consume,
                (
                    q_ptr, out_ptr, q_smem.index(1), k_tiles, v_tiles, k_full, k_empty, v_full,
                    v_empty, HALF, first_token, end, first_pos, seq_len, num_tiles, num_masked,
                    head_idx, scale_log2, Q_STRIDE_TOKEN, Q_STRIDE_HEAD, NUM_KV_HEADS, GROUP,
                    order, 1,
                ),
            ),
            (
                _copy,
                (
                    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty, table_at,
                    num_tiles, last_block, head_idx, BLOCK, ROWS,
                ),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip


class _Pieces(TensorDescriptor):  # type: ignore[misc]  # Triton has no types
    """A descriptor without checks: `suits` made them, and a dry run's tensors have no address."""

    def __post_init__(self) -> None:
        pass


def hopper_constants(
    num_heads: int, num_kv_heads: int, block_size: int, num_rows: int
) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "BLOCK": block_size,
        "ROWS": min(block_size & -block_size, TILE.value),
        "ROWS_P": padded_rows(num_rows),
    }


def suits(
    q_TNH: Tensor, k_cache_CBKH: Tensor, v_cache_CBKH: Tensor, max_q_len: int, window: int
) -> bool:
    """True if `paged_attention_prefill_hopper` can compute this attention, and is faster."""
    num_heads, head_dim = q_TNH.shape[1:]
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    group = num_heads // num_kv_heads
    return (
        max_q_len >= MIN_TOKENS
        and head_dim == HEAD.value
        and window <= 0
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and k_cache_CBKH.dtype == v_cache_CBKH.dtype == q_TNH.dtype
        and group <= HALF.value
        and group & (group - 1) == 0
        and block_size % 16 == 0
        and k_cache_CBKH.is_contiguous()
        and v_cache_CBKH.is_contiguous()
        and q_TNH.stride(2) == 1
        and q_TNH.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q_TNH.device) == (9, 0)
    )


def paged_attention_prefill_hopper(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    scale: float,
) -> Tensor:
    """`attention_prefill.paged_attention_prefill` for calls that `suits` accepts.

    The scale must be positive.
    """
    if scale <= 0:
        raise ValueError(f"attention scale must be positive, got {scale}")
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_rows = block_table_RP.shape[0]
    num_blocks, block_size, num_kv_heads = k_cache_CBKH.shape[:3]
    out_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=q_TNH.dtype, device=q_TNH.device)
    if num_tokens == 0:
        return out_TNH
    constants = hopper_constants(num_heads, num_kv_heads, block_size, num_rows)
    row_size = num_kv_heads * head_dim
    k_pieces, v_pieces = (
        _Pieces(
            cache, [num_blocks * block_size, row_size], [row_size, 1],
            [constants["ROWS"], CHUNK.value],
            gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
        )
        for cache in (k_cache_CBKH, v_cache_CBKH)
    )  # fmt: skip
    tokens = 2 * HALF.value // constants["GROUP"]
    num_tiles = num_tokens // tokens + num_rows + 2
    prefill_hopper_kernel[(num_tiles * num_kv_heads,)](
        q_TNH,
        k_pieces,
        v_pieces,
        block_table_RP,
        seq_len_R,
        q_start_S,
        out_TNH,
        num_tokens,
        num_rows,
        block_table_RP.stride(0),
        scale * LOG2_E,
        *q_TNH.stride()[:2],
        **constants,
        num_warps=NUM_WARPS,
        **launch_options(q_TNH.device),
    )
    return out_TNH
