"""The dense decoder: Llama, Mistral, Qwen2 and Qwen3 are this mathematics with different switches in their configs.

T tokens | R rows (requests) | S = R + 1 | P blocks per row | C cache blocks | B block size | D hidden | N query heads
K kv heads | H head size | E = (N + 2K)·H | Q = N·H | F ffn | G = 2F | V vocabulary | M positions. Every dim is a Python
int fixed by the bucket; `x_TD` is [T, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats.int8 import Int8Weight, linear


class Layer(NamedTuple):
    """Weights of one decoder layer."""

    attn_norm_D: Tensor
    qkv_ED: Tensor | Int8Weight
    qkv_bias_E: Tensor | None
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    out_DQ: Tensor | Int8Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    gate_up_GD: Tensor | Int8Weight
    gate_up_bias_G: Tensor | None
    down_DF: Tensor | Int8Weight
    down_bias_D: Tensor | None


class Params(NamedTuple):
    """All weights; `head_VD` is `embed_VD` itself where the checkpoint ties them, unless it is quantized."""

    embed_VD: Tensor
    layers: tuple[Layer, ...]
    final_norm_D: Tensor
    head_VD: Tensor | Int8Weight


class LayerCache(NamedTuple):
    """One layer's keys and values; with scales they are float8_e4m3fn and stand for themselves times their head's scale."""

    k_CBKH: Tensor
    v_CBKH: Tensor
    k_scale_K: Tensor | None = None
    v_scale_K: Tensor | None = None


class Batch(NamedTuple):
    """What changes between two steps of one bucket, and nothing else."""

    pos_T: Tensor  # position of each token in its request
    slot_T: Tensor  # cache slot it writes: block · B + offset
    block_table_RP: Tensor
    seq_len_R: Tensor  # tokens of each row, this step's included
    q_start_S: Tensor  # row r owns tokens q_start[r] .. q_start[r + 1] − 1


def embed(cfg: ModelConfig, embed_VD: Tensor, token_T: Tensor) -> Tensor:
    """Token ids to the hidden state [T, D]."""
    return torch.nn.functional.embedding(token_T, embed_VD)


def layer(
    cfg: ModelConfig,
    window: int,
    max_q_len: int,
    w: Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
    keep_R: Tensor | None = None,
) -> Tensor:
    """One decoder layer; writes the keys and values of T tokens into kv. Traced once per bucket, called once per layer.

    With `keep_R` the result is [R, D], of the tokens at these indices alone.
    """
    qkv_TE = linear(ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps), w.qkv_ED, w.qkv_bias_E)
    q_TNH, k_TKH, v_TKH = qkv_TE.view(qkv_TE.shape[0], -1, cfg.head_dim).split(
        [cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads], dim=1
    )
    if w.q_norm_H is not None and w.k_norm_H is not None:
        q_TNH, k_TKH = (
            ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps),
            ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps),
        )
    q_TNH, k_TKH = (
        ops.rope(q_TNH, cos_sin_MH, batch.pos_T),
        ops.rope(k_TKH, cos_sin_MH, batch.pos_T),
    )
    ops.store_kv(k_TKH, v_TKH, kv.k_CBKH, kv.v_CBKH, batch.slot_T, kv.k_scale_K, kv.v_scale_K)
    o_TNH = ops.ATTENTION[cfg.attention_backend](
        q_TNH,
        kv.k_CBKH,
        kv.v_CBKH,
        batch.block_table_RP,
        batch.seq_len_R,
        batch.q_start_S,
        max_q_len,
        cfg.head_dim**-0.5,
        window,
        kv.k_scale_K,
        kv.v_scale_K,
    )
    o_TQ = o_TNH.flatten(1)
    if keep_R is not None:
        # from here on no token sees another, so what nobody will read need not be computed: T is R below
        o_TQ, h_TD = o_TQ.index_select(0, keep_R), h_TD.index_select(0, keep_R)
    h_TD = linear(o_TQ, w.out_DQ, w.out_bias_D, h_TD)
    gate_up_TG = linear(
        ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps), w.gate_up_GD, w.gate_up_bias_G
    )
    return linear(ops.silu_mul(gate_up_TG), w.down_DF, w.down_bias_D, h_TD)


def head(
    cfg: ModelConfig, final_norm_D: Tensor, head_VD: Tensor | Int8Weight, h_RD: Tensor
) -> Tensor:
    """Final norm and projection to the vocabulary: logits [R, V] in the model's dtype."""
    return linear(ops.rms_norm(h_RD, final_norm_D, cfg.norm_eps), head_VD, None)
