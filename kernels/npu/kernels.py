"""Our ops as Ascend's fused ops, and the tables that map each op to its function.

The functions call `torch.ops.npu`, which exists once torch_npu is imported; importing this module
does not import it. They run op by op on a device, and a graph pass puts them into traced graphs.

Shapes: T tokens | R rows | P blocks per row | C blocks in the cache | B block size | D hidden | N
query heads | K kv heads | H head size | F ffn size | M positions in the rotary table | W vocabulary
rows of one rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import collectives, ops, reference
from nanovllm.kernels.npu.experts import expert_linear, experts, topk_softmax
from nanovllm.kernels.npu.varlen_attention import varlen_attention_eager, varlen_attention_in_graph

# fused_infer_attention_score reads a causal mask of this size for any lengths (its sparse mode 3).
# It takes block sizes of the paged cache that are multiples of 128 if a row has several query
# tokens, and of at most 512 if it has one.
CAUSAL_MASK_SIZE = 2048
RIGHT_DOWN_CAUSAL = 3
BLOCK_SIZE_STEP, MAX_BLOCK_SIZE = 128, 512


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, added = torch.ops.npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, added


def silu_mul(gate_up: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(gate_up, -1)


def rope(x_TNH: Tensor, cos_sin_MH: Tensor, pos_T: Tensor) -> Tensor:
    """Half-split rotation. npu_rotary_mul takes cos and sin in x's dtype, each over the whole head.

    In bf16 the table is therefore rounded before the product, as in transformers;
    `reference.rope_store.rope` rounds once, after it.
    """
    cos_Th, sin_Th = cos_sin_MH.index_select(0, pos_T).to(x_TNH.dtype).chunk(2, dim=-1)
    cos_T11H = torch.cat((cos_Th, cos_Th), dim=-1)[:, None, None]
    sin_T11H = torch.cat((sin_Th, sin_Th), dim=-1)[:, None, None]
    return torch.ops.npu.npu_rotary_mul(x_TNH.unsqueeze(1), cos_T11H, sin_T11H).squeeze(1)


def store_kv(
    k_TKH: Tensor, v_TKH: Tensor, k_cache_CBKH: Tensor, v_cache_CBKH: Tensor, slot_T: Tensor
) -> None:
    """Writes into the whole cache tensor at (block, offset).

    Ascend's op would copy the cache if its target were a view of it.
    """
    block_size = k_cache_CBKH.shape[1]
    index_T2 = torch.stack((slot_T // block_size, slot_T % block_size), dim=-1)
    torch.ops.npu.npu_scatter_nd_update_(k_cache_CBKH, index_T2, k_TKH)
    torch.ops.npu.npu_scatter_nd_update_(v_cache_CBKH, index_T2, v_TKH)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def causal_mask(device: torch.device) -> Tensor:
    """[2048, 2048] bool, true where a key must not be seen: the mask of sparse mode 3."""
    position = torch.arange(CAUSAL_MASK_SIZE, device=device)
    return position > position.unsqueeze(1)


def check_attention(block_size: int, max_q_len: int, window: int) -> None:
    """ValueError for what fused_infer_attention_score does not support on a paged cache."""
    if window > 0:
        raise ValueError(
            f"the checkpoint has a sliding window of {window} tokens: attention windows are not "
            "supported on an NPU"
        )
    if block_size % BLOCK_SIZE_STEP or block_size > MAX_BLOCK_SIZE:
        raise ValueError(
            f"kvcache_block_size is {block_size}: on an NPU it must be a multiple of "
            f"{BLOCK_SIZE_STEP}, at most {MAX_BLOCK_SIZE}"
        )


def _check_inputs(
    q_TNH: Tensor, k_cache_CBKH: Tensor, block_table_RP: Tensor, seq_len_R: Tensor, num_rows: int
) -> None:
    """Asserts shapes and dtypes: torchair accepts any, and the op would then read wrong memory."""
    assert q_TNH.dtype == k_cache_CBKH.dtype, (q_TNH.dtype, k_cache_CBKH.dtype)
    assert (
        q_TNH.shape[2] == k_cache_CBKH.shape[3] and q_TNH.shape[1] % k_cache_CBKH.shape[2] == 0
    ), (q_TNH.shape, k_cache_CBKH.shape)
    assert block_table_RP.dtype == torch.int32, block_table_RP.dtype
    assert block_table_RP.shape[0] == seq_len_R.shape[0] == num_rows, (
        block_table_RP.shape,
        seq_len_R.shape,
        num_rows,
    )


def paged_attention_in_graph(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """`reference.attention.paged_attention` with the lengths as tensors: one graph serves all
    lengths.

    It runs in graph mode of GE only.

    Decode uses layout BSH with one token a row. Prefill uses layout TND, in which the last running
    token count must be T: tokens that belong to no row become one more row, on the padding block.
    """
    from torchair.ops import npu_fused_infer_attention_score as attend

    check_attention(k_cache_CBKH.shape[1], max_q_len, window)
    num_tokens, num_heads, head_dim = q_TNH.shape
    _check_inputs(
        q_TNH,
        k_cache_CBKH,
        block_table_RP,
        seq_len_R,
        num_tokens if max_q_len == 1 else q_start_S.shape[0] - 1,
    )
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    settings: dict[str, Any] = {
        "num_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "scale": scale,
        "block_size": block_size,
    }
    k_CBA, v_CBA = k_cache_CBKH.flatten(2), v_cache_CBKH.flatten(2)
    if max_q_len == 1:
        out, _ = attend(
            q_TNH.reshape(num_tokens, 1, -1),
            k_CBA,
            v_CBA,
            block_table=block_table_RP,
            actual_seq_lengths_kv=seq_len_R.long(),
            input_layout="BSH",
            **settings,
        )
        return out.view(num_tokens, num_heads, head_dim)
    capacity = block_table_RP.shape[1] * block_size
    q_end_R = q_start_S[1:].long()
    num_left_1 = (q_end_R[-1:] * -1 + num_tokens).clamp(1, capacity)
    out, _ = attend(
        q_TNH,
        k_CBA,
        v_CBA,
        atten_mask=causal_mask(q_TNH.device),
        block_table=torch.cat((block_table_RP, torch.zeros_like(block_table_RP[:1]))),
        actual_seq_lengths=torch.cat((q_end_R, torch.full_like(num_left_1, num_tokens))),
        actual_seq_lengths_kv=torch.cat((seq_len_R.long(), num_left_1)),
        input_layout="TND",
        sparse_mode=RIGHT_DOWN_CAUSAL,
        **settings,
    )
    return out


def paged_attention_eager(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """The same op outside a graph. It takes lengths as numbers, so it waits for the device."""
    check_attention(k_cache_CBKH.shape[1], max_q_len, window)
    num_tokens, num_heads = q_TNH.shape[:2]
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    seq_lens = seq_len_R.tolist()
    if max_q_len == 1:
        return _decode_attention(q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_lens, scale)
    # rows without tokens and tokens without a row are left out: the op never sees padding
    starts = q_start_S.tolist()
    rows = [row for row in range(len(seq_lens)) if starts[row + 1] > starts[row]]
    if not rows:
        return torch.zeros_like(q_TNH)
    num_used = starts[-1]
    row_idx = torch.tensor(rows, device=q_TNH.device)
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q_TNH[:num_used].contiguous(),
        k_cache_CBKH.flatten(2),
        v_cache_CBKH.flatten(2),
        atten_mask=causal_mask(q_TNH.device),
        block_table=block_table_RP.index_select(0, row_idx),
        actual_seq_lengths=[starts[row + 1] for row in rows],
        actual_seq_lengths_kv=[seq_lens[row] for row in rows],
        input_layout="TND",
        sparse_mode=RIGHT_DOWN_CAUSAL,
        num_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        scale=scale,
        block_size=block_size,
    )
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, num_tokens - num_used))


def paged_attention_captured(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """For captured graphs: decode uses a length of 1 a row, which is replaced before each replay.

    Outside GE the op takes lengths as numbers on the host. Prefill steps are not captured and keep
    our op.
    """
    if max_q_len > 1:
        return ops.paged_attention(
            q_TNH,
            k_cache_CBKH,
            v_cache_CBKH,
            block_table_RP,
            seq_len_R,
            q_start_S,
            max_q_len,
            scale,
            window,
        )
    check_attention(k_cache_CBKH.shape[1], max_q_len, window)
    return _decode_attention(
        q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, [1] * q_TNH.shape[0], scale
    )


def _decode_attention(
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_lens: list[int],
    scale: float,
) -> Tensor:
    num_rows, num_heads, head_dim = q_RNH.shape
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q_RNH.reshape(num_rows, 1, -1),
        k_cache_CBKH.flatten(2),
        v_cache_CBKH.flatten(2),
        block_table=block_table_RP,
        actual_seq_lengths_kv=seq_lens,
        input_layout="BSH",
        num_heads=num_heads,
        num_key_value_heads=k_cache_CBKH.shape[2],
        scale=scale,
        block_size=k_cache_CBKH.shape[1],
    )
    return out.view(num_rows, num_heads, head_dim)


# Sums and gathers over ranks. Outside GE they stay our ops, which the group in use carries out.


def all_reduce_in_graph(x: Tensor, residual: Tensor | None = None) -> Tensor:
    total = ops.all_reduce(x)
    return total if residual is None else total + residual


def gather_columns_in_graph(x_RW: Tensor, num_columns: int) -> Tensor:
    """A split and a concatenation: a transposition would be followed by a copy."""
    num_ranks, (num_rows, width) = collectives.current().size, x_RW.shape
    rows_of_rank = ops.all_gather(x_RW, num_ranks).flatten(0, 1).split(num_rows)
    taken = [min(width, num_columns - rank * width) for rank in range(num_ranks)]
    parts = [rows.narrow(1, 0, n) for rows, n in zip(rows_of_rank, taken, strict=True) if n > 0]
    return torch.cat(parts, dim=1)


def sample_columns_in_graph(
    logits_RW: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, num_columns: int
) -> Tensor:
    """It gathers the logits: a choice from a rank's own columns has not been written for GE."""
    logits_RV = gather_columns_in_graph(logits_RW, num_columns)
    return reference.sample.sample(logits_RV, temperature_R, seed_R, pos_R)


def shard_embedding_in_graph(token_T: Tensor, table_WD: Tensor) -> Tensor:
    return collectives.rows_of_rank(token_T, table_WD, ops.own_rank(token_T))


COMMUNICATE: dict[str, Callable[..., Any]] = {
    "all_reduce": ops.all_reduce,
    "gather_columns": ops.gather_columns,
    "sample_columns": ops.sample_columns,
    "shard_embedding": ops.shard_embedding,
}

# our op → the function that runs outside a graph. Ops that are not here, such as `sample`, run as
# plain torch.
EAGER: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "silu_mul": silu_mul,
    "rope": rope,
    "store_kv": store_kv,
    "linear": linear,
    "topk_softmax": topk_softmax,
    "experts": experts,
    "expert_linear": expert_linear,
    "paged_attention": paged_attention_eager,
    "varlen_attention": varlen_attention_eager,
}
# our op → the function in a graph for GE
IN_GRAPH: dict[str, Callable[..., Any]] = {
    **EAGER,
    "paged_attention": paged_attention_in_graph,
    "varlen_attention": varlen_attention_in_graph,
    "all_reduce": all_reduce_in_graph,
    "gather_columns": gather_columns_in_graph,
    "sample_columns": sample_columns_in_graph,
    "shard_embedding": shard_embedding_in_graph,
}
# our op → the function in a graph whose decode steps are captured
IN_CAPTURE: dict[str, Callable[..., Any]] = {
    **EAGER,
    **COMMUNICATE,
    "paged_attention": paged_attention_captured,
    # towers run op by op there, and the op reads segments on the host
    "varlen_attention": ops.varlen_attention,
}
# ops that use Ascend's kernels even if nothing is fused
NEVER_PLAIN = frozenset({
    "paged_attention", "varlen_attention", "store_kv", "linear", "topk_softmax", "experts",
    "expert_linear", *COMMUNICATE,
})  # fmt: skip
