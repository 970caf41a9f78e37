"""The SigLIP tower of Gemma-3: all images have the same size, positions are a learned table, and
groups of m² patches are averaged to one token. Its blocks are those of `qwen3_vl`, without a
rotation. Letters are in `interface`; I = table_side².
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

from nanovllm.models.model import Param
from nanovllm.models.vision import parts
from nanovllm.models.vision.qwen3_vl import Qwen3VLBlock, block
from nanovllm.models.vision.vision_encoder import FrameLayout, Outer, Tower, TowerConfig

NAME = "Gemma3ForConditionalGeneration"
PREFIXES = ("model.", "")
MODULES = ("vision_tower.", "multi_modal_projector.")
ALL = tuple(prefix + module for prefix in PREFIXES for module in MODULES)  # of its tensors


class Projector(NamedTuple):
    """The weights after the last block. `token_norm_D` lacks 1."""

    norm_D: Tensor
    norm_bias_D: Tensor
    token_norm_D: Tensor
    proj_DO: Tensor


def tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of transformers' `SiglipVisionConfig`, with `mm_tokens_per_image` and the text
    model's `out_hidden_size`. Raises ValueError for settings that no region computes."""
    if vision.hidden_act != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_act {vision.hidden_act!r} of the vision tower is not supported by {NAME}: "
            "only 'gelu_pytorch_tanh' is"
        )
    for name in ("image_size", "patch_size"):
        value = getattr(vision, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} of the vision tower is {value!r}: it must be one number")
    side, tokens = vision.image_size // vision.patch_size, math.isqrt(vision.mm_tokens_per_image)
    if tokens < 1 or tokens**2 != vision.mm_tokens_per_image or side % tokens:
        raise ValueError(
            f"mm_tokens_per_image is {vision.mm_tokens_per_image}: it must be the square of a "
            f"divisor of {side}, the patches on a side of an image"
        )
    config = TowerConfig(
        architecture=NAME,
        depth=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        num_heads=vision.num_attention_heads,
        ffn_size=vision.intermediate_size,
        out_size=vision.out_hidden_size,
        patch_shape=(vision.num_channels, 1, vision.patch_size, vision.patch_size),
        merge_size=side // tokens,
        full_blocks=tuple(range(vision.num_hidden_layers)),
        table_side=side,
        frame_side=side,
        norm_eps=vision.layer_norm_eps,
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
        merger_type=Projector,
        unused=("vision_tower.head.",),
        prefixes=PREFIXES,
        modules=MODULES,
    )


# regions -----------------------------------------------------------------------------------------


def embed(cfg: TowerConfig, w: Outer, layout: FrameLayout, pixel_TC: Tensor) -> tuple[Tensor, None]:
    """Patches to the hidden state [T, D] with learned positions; nothing is rotated."""
    assert layout.taps is not None and w.table_ID is not None
    # frames have the table's size: the first of the four entries has all the weight
    entry_T = layout.taps.entry_T4.select(1, 0)
    h_TD = parts.embed_patches(w, pixel_TC) + embedding(entry_T, w.table_ID)
    return h_TD, None


def merge(cfg: TowerConfig, w: Projector, place_G: None, h_TD: Tensor) -> Tensor:
    """Tokens [G, O]: the normalised mean of each group's patches, in the text model's size."""
    x_TD = layer_norm(h_TD, h_TD.shape[1:], w.norm_D, w.norm_bias_D, cfg.norm_eps)
    mean_GD = x_TD.unflatten(0, (-1, cfg.merge_size**2)).mean(1).float()
    scale_G1 = torch.rsqrt(mean_GD.square().mean(-1, keepdim=True) + cfg.norm_eps)
    normed_GD = mean_GD * scale_G1 * (1.0 + w.token_norm_D.float())
    return normed_GD.to(h_TD.dtype) @ w.proj_DO


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: TowerConfig) -> dict[str, Param]:
    prefix, hidden = "vision_tower.embeddings.", cfg.hidden_size
    channels, _, *sides = cfg.patch_shape
    patch = Param.one("conv", prefix + "patch_embedding.weight", hidden, channels, *sides)
    table = Param.one("table", prefix + "position_embedding.weight", cfg.table_side**2, hidden)
    bias = Param.one("bias", prefix + "patch_embedding.bias", hidden)
    return {"patch_DCTPP": patch, "patch_bias_D": bias, "table_ID": table}


def block_params(cfg: TowerConfig, block_idx: int) -> dict[str, Param]:
    """Parameters of one block, by the fields of `Qwen3VLBlock`."""
    prefix, hidden = f"vision_tower.encoder.layers.{block_idx}.", cfg.hidden_size
    names = tuple(f"{prefix}self_attn.{one}_proj" for one in "qkv")
    sizes = (hidden,) * 3
    return {
        **parts.norm_params("attn_norm", "_D", prefix + "layer_norm1", hidden),
        "qkv_ED": Param.stack("linear", tuple(f"{one}.weight" for one in names), sizes, hidden),
        "qkv_bias_E": Param.stack("bias", tuple(f"{one}.bias" for one in names), sizes),
        **parts.product("out", "DD", prefix + "self_attn.out_proj", hidden, hidden),
        **parts.norm_params("mlp_norm", "_D", prefix + "layer_norm2", hidden),
        **parts.product("up", "FD", prefix + "mlp.fc1", cfg.ffn_size, hidden),
        **parts.product("down", "DF", prefix + "mlp.fc2", hidden, cfg.ffn_size),
    }


def merger_params(cfg: TowerConfig, level: int) -> dict[str, Param]:
    """Parameters after the last block, by the fields of `Projector`."""
    prefix, hidden = "multi_modal_projector.", cfg.hidden_size
    # zeros of random weights: 1 is added
    norm = Param.one("bias", prefix + "mm_soft_emb_norm.weight", hidden)
    proj = Param.one("linear", prefix + "mm_input_projection_weight", hidden, cfg.out_size)
    return {
        **parts.norm_params("norm", "_D", "vision_tower.post_layernorm", hidden),
        "token_norm_D": norm,
        "proj_DO": proj,
    }
