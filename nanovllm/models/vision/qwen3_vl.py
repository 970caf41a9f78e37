"""The vision tower of Qwen3-VL and Qwen3.5: layer norms, plain MLPs, a learned table of positions
that is interpolated to each frame's size, and, of Qwen3-VL, features of several blocks (deepstack,
Meng et al. 2024, https://arxiv.org/abs/2406.04334). Letters are in `interface`; I = table_side².
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from nanovllm.kernels import ops
from nanovllm.models.model import Param
from nanovllm.models.vision import parts
from nanovllm.models.vision.vision_encoder import FrameLayout, Merger, Outer, Tower, TowerConfig

NAME = "Qwen3VLForConditionalGeneration"


class Qwen3VLBlock(NamedTuple):
    """Weights of one block."""

    attn_norm_D: Tensor
    attn_norm_bias_D: Tensor
    qkv_ED: Tensor
    qkv_bias_E: Tensor
    out_DD: Tensor
    out_bias_D: Tensor
    mlp_norm_D: Tensor
    mlp_norm_bias_D: Tensor
    up_FD: Tensor
    up_bias_F: Tensor
    down_DF: Tensor
    down_bias_D: Tensor


def tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of transformers' `Qwen3VLVisionConfig` or `Qwen3VLMoeVisionConfig`."""
    return made(vision, dtype, NAME, tuple(vision.deepstack_visual_indexes))


def qwen3_5_tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of transformers' `Qwen3_5VisionConfig` or `Qwen3_5MoeVisionConfig`."""
    return made(vision, dtype, "Qwen3_5ForConditionalGeneration", ())


def made(vision: Any, dtype: torch.dtype, architecture: str, taken: tuple[int, ...]) -> Tower:
    """A tower whose features after the `taken` blocks are added to the text model's."""
    fields = parts.common_fields(vision, architecture, "gelu_pytorch_tanh")
    side = math.isqrt(vision.num_position_embeddings)
    if side < 1 or side**2 != vision.num_position_embeddings:
        raise ValueError(
            f"num_position_embeddings {vision.num_position_embeddings} of the vision tower must be "
            "a square"
        )
    if list(taken) != sorted(set(taken)):
        raise ValueError(f"deepstack_visual_indexes {list(taken)} must ascend")
    config = TowerConfig(
        **fields,
        full_blocks=tuple(range(vision.depth)),
        deepstack_blocks=taken,
        table_side=side,
        dtype=dtype,
    )
    return Tower(
        config=config,
        embed=embed,
        block=block,
        merge=merge,
        outer_params=outer_params,
        block_params=block_params,
        merger_params=merger_params,
        block_type=Qwen3VLBlock,
    )


# regions -----------------------------------------------------------------------------------------


def embed(
    cfg: TowerConfig, w: Outer, layout: FrameLayout, pixel_TC: Tensor
) -> tuple[Tensor, Tensor]:
    """Patches to the hidden state [T, D] with learned positions, and the rotary table [T, H]."""
    assert layout.taps is not None and w.table_ID is not None
    h_TD = parts.embed_patches(w, pixel_TC)
    entry_T4D = torch.nn.functional.embedding(layout.taps.entry_T4, w.table_ID)
    position_TD = (entry_T4D * layout.taps.weight_T4.unsqueeze(2)).sum(1)
    return h_TD + position_TD.to(h_TD.dtype), parts.rotary_table(cfg, layout)


def block(
    cfg: TowerConfig,
    max_len: int,
    w: Qwen3VLBlock,
    rope_TH: Tensor | None,
    start_S: Tensor,
    h_TD: Tensor,
) -> Tensor:
    """One block; segments are frames, of at most `max_len` patches."""
    x_TD = _normed(cfg, h_TD, w.attn_norm_D, w.attn_norm_bias_D)
    h_TD = parts.attention(cfg, max_len, w, rope_TH, start_S, x_TD, h_TD)
    x_TD = _normed(cfg, h_TD, w.mlp_norm_D, w.mlp_norm_bias_D)
    x_TF = gelu(ops.linear(x_TD, w.up_FD, w.up_bias_F), approximate="tanh")
    return ops.linear(x_TF, w.down_DF, w.down_bias_D, h_TD)


def merge(cfg: TowerConfig, w: Merger, place_G: None, h_TD: Tensor) -> Tensor:
    """Tokens [G, O]. The embedding's merger normalises patches, those of deepstack groups."""
    assert w.norm_bias is not None
    x = _normed(cfg, h_TD.view(-1, w.norm.shape[0]), w.norm, w.norm_bias)
    return parts.merge_groups(w, x.view(-1, w.up_MM.shape[1]))


def _normed(cfg: TowerConfig, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias, cfg.norm_eps)


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: TowerConfig) -> dict[str, Param]:
    table = Param.one("table", "pos_embed.weight", cfg.table_side**2, cfg.hidden_size)
    bias = Param.one("bias", "patch_embed.proj.bias", cfg.hidden_size)
    return {"patch_DCTPP": parts.patch_param(cfg), "patch_bias_D": bias, "table_ID": table}


def block_params(cfg: TowerConfig, block_idx: int) -> dict[str, Param]:
    """Parameters of one block, by the fields of `Qwen3VLBlock`."""
    prefix, hidden, ffn = f"blocks.{block_idx}.", cfg.hidden_size, cfg.ffn_size
    return {
        **parts.norm_params("attn_norm", "_D", prefix + "norm1", hidden),
        **parts.attention_params(cfg, block_idx),
        **parts.norm_params("mlp_norm", "_D", prefix + "norm2", hidden),
        **parts.product("up", "FD", prefix + "mlp.linear_fc1", ffn, hidden),
        **parts.product("down", "DF", prefix + "mlp.linear_fc2", hidden, ffn),
    }


def merger_params(cfg: TowerConfig, level: int) -> dict[str, Param]:
    """Parameters of the merger of one level of features, by the fields of `Merger`."""
    prefix = f"deepstack_merger_list.{level - 1}." if level else "merger."
    size = cfg.hidden_size * (cfg.patches_per_group if level else 1)
    return {
        **parts.norm_params("norm", "", prefix + "norm", size),
        **parts.merging_params(cfg, prefix + "linear_fc1", prefix + "linear_fc2"),
    }
