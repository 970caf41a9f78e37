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
from nanovllm.kernels.npu.attention import (
    paged_attention_captured,
    paged_attention_eager,
    paged_attention_in_graph,
)
from nanovllm.kernels.npu.experts import clamped_experts, expert_linear, experts, topk_softmax
from nanovllm.kernels.npu.latent_attention import latent_inputs, no_graph
from nanovllm.kernels.npu.state import (
    causal_conv,
    gated_delta,
    gated_delta_step,
    ssd,
    ssd_step,
    store_state,
)
from nanovllm.kernels.npu.varlen_attention import varlen_attention_eager, varlen_attention_in_graph


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
    "latent_inputs": latent_inputs,
    "store_state": store_state,
    "causal_conv": causal_conv,
    "gated_delta": gated_delta,
    "gated_delta_step": gated_delta_step,
    "ssd": ssd,
    "ssd_step": ssd_step,
    "linear": linear,
    "topk_softmax": topk_softmax,
    "experts": experts,
    "expert_linear": expert_linear,
    "clamped_experts": clamped_experts,
    "paged_attention": paged_attention_eager,
    "varlen_attention": varlen_attention_eager,
}
# our op → the function in a graph for GE
IN_GRAPH: dict[str, Callable[..., Any]] = {
    **EAGER,
    "latent_attention": no_graph,
    "latent_span_attention": no_graph,
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
    "latent_attention": no_graph,
    "latent_span_attention": no_graph,
    "paged_attention": paged_attention_captured,
    # towers run op by op there, and the op reads segments on the host
    "varlen_attention": ops.varlen_attention,
}
# ops that use Ascend's kernels even if nothing is fused
NEVER_PLAIN = frozenset({
    "latent_attention", "latent_inputs", "latent_span_attention", "paged_attention",
    "varlen_attention", "store_kv", "store_state", "linear", "topk_softmax", "experts",
    "clamped_experts", "expert_linear", "causal_conv", "gated_delta", "gated_delta_step", "ssd",
    "ssd_step", *COMMUNICATE,
})  # fmt: skip
