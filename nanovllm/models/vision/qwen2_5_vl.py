"""The vision encoder of Qwen2.5-VL: RMS norms, gated MLPs, and attention within windows in all but
a few blocks (Bai et al. 2025, https://arxiv.org/abs/2502.13923). Letters are in `interface`;
V = 2F.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.model import Param
from nanovllm.models.vision import parts
from nanovllm.models.vision.vision_encoder import FrameLayout, Merger, Outer, Tower, TowerConfig

NAME = "Qwen2_5_VLForConditionalGeneration"
# 16 bytes in bf16: cuBLAS is fastest for rows that begin at multiples of 16 bytes. The published
# width, 3,420, is not a multiple of 8.
WIDTH = 8


class Qwen25VLBlock(NamedTuple):
    """Weights of one block."""

    attn_norm_D: Tensor
    qkv_ED: Tensor
    qkv_bias_E: Tensor
    out_DD: Tensor
    out_bias_D: Tensor
    mlp_norm_D: Tensor
    gate_up_VD: Tensor
    gate_up_bias_V: Tensor
    down_DF: Tensor
    down_bias_D: Tensor


def tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of transformers' `Qwen2_5_VLVisionConfig`."""
    fields = parts.common_fields(vision, NAME, "silu")
    token_side = vision.patch_size * vision.spatial_merge_size
    config = TowerConfig(
        **fields,
        full_blocks=tuple(sorted(set(vision.fullatt_block_indexes))),
        window_groups=vision.window_size // token_side,
        tokens_per_second=getattr(vision, "tokens_per_second", 1.0),
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
        block_type=Qwen25VLBlock,
    )


# regions -----------------------------------------------------------------------------------------


def embed(
    cfg: TowerConfig, w: Outer, layout: FrameLayout, pixel_TC: Tensor
) -> tuple[Tensor, Tensor]:
    """Patches to the hidden state [T, D], in the order of windows, and the rotary table [T, H]."""
    h_TD = parts.embed_patches(w, pixel_TC)
    if layout.windows is not None:
        h_GM = h_TD.view(-1, cfg.merge_size**2 * h_TD.shape[1])
        h_TD = h_GM.index_select(0, layout.windows.order_G).view(h_TD.shape)
    return h_TD, parts.rotary_table(cfg, layout)


def block(
    cfg: TowerConfig, max_len: int, w: Qwen25VLBlock, rope_TH: Tensor, start_S: Tensor, h_TD: Tensor
) -> Tensor:
    """One block; segments are frames or windows, of at most `max_len` patches."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    h_TD = parts.attention(cfg, max_len, w, rope_TH, start_S, x_TD, h_TD)
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    gate_up_TV = ops.linear(x_TD, w.gate_up_VD, w.gate_up_bias_V)
    return ops.linear(ops.silu_mul(gate_up_TV), w.down_DF, w.down_bias_D, h_TD)


def merge(cfg: TowerConfig, w: Merger, place_G: Tensor | None, h_TD: Tensor) -> Tensor:
    """Tokens [G, O], in the order of frames."""
    x_TD = ops.rms_norm(h_TD, w.norm, cfg.norm_eps)
    tokens_GO = parts.merge_groups(w, x_TD.view(-1, w.up_MM.shape[1]))
    return tokens_GO if place_G is None else tokens_GO.index_select(0, place_G)


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: TowerConfig) -> dict[str, Param]:
    return {"patch_DCTPP": parts.patch_param(cfg)}


def block_params(cfg: TowerConfig, block_idx: int) -> dict[str, Param]:
    """Parameters of one block, by the fields of `Qwen25VLBlock`.

    MLPs are padded to multiples of WIDTH. Padding adds nothing: its silu(gate) · up is zero.
    """
    prefix, hidden, ffn = f"blocks.{block_idx}.", cfg.hidden_size, cfg.ffn_size
    width = -(-ffn // WIDTH) * WIDTH
    gate_up = tuple(prefix + f"mlp.{name}_proj" for name in ("gate", "up"))
    weights, biases = (tuple(f"{name}.{kind}" for name in gate_up) for kind in ("weight", "bias"))
    made = {
        "attn_norm_D": Param.one("norm", prefix + "norm1.weight", hidden),
        **parts.attention_params(cfg, block_idx),
        "mlp_norm_D": Param.one("norm", prefix + "norm2.weight", hidden),
        "gate_up_VD": Param.stack("linear", weights, (width, width), hidden),
        "gate_up_bias_V": Param.stack("bias", biases, (width, width)),
        **parts.product("down", "DF", prefix + "mlp.down_proj", hidden, width),
    }
    if width > ffn:
        real = {"gate_up_VD": (ffn, hidden), "gate_up_bias_V": (ffn,), "down_DF": (hidden, ffn)}
        made |= {name: made[name]._replace(source_shape=shape) for name, shape in real.items()}
    return made


def merger_params(cfg: TowerConfig, level: int) -> dict[str, Param]:
    """Parameters of the merger, by the fields of `Merger`."""
    norm = Param.one("norm", "merger.ln_q.weight", cfg.hidden_size)
    return {"norm": norm, **parts.merging_params(cfg, "merger.mlp.0", "merger.mlp.2")}
