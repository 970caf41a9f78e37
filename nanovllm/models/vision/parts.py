"""Regions and parameters shared by several towers. Letters are in `interface`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.model import Param
from nanovllm.models.vision.vision_encoder import FrameLayout, Merger, Outer, TowerConfig


class TowerAttentionWeights(Protocol):
    """The weights that `attention` reads."""

    @property
    def qkv_ED(self) -> Tensor: ...
    @property
    def qkv_bias_E(self) -> Tensor: ...
    @property
    def out_DD(self) -> Tensor: ...
    @property
    def out_bias_D(self) -> Tensor: ...


# regions -----------------------------------------------------------------------------------------


def embed_patches(w: Outer, pixel_TC: Tensor) -> Tensor:
    """Patches to the hidden state [T, D]: a convolution whose kernel is a whole patch."""
    return ops.linear(pixel_TC, w.patch_DCTPP.flatten(1), w.patch_bias_D)


def rotary_table(cfg: TowerConfig, layout: FrameLayout) -> Tensor:
    """[cos | sin] of each patch, fp32 [T, H].

    The first half of the H / 2 angles follows the patch's row, the second its column.
    """
    width = cfg.head_dim // 2
    exponent = torch.arange(0, width, 2, device=layout.row_col_T2.device).float() / width
    angle_T2h = layout.row_col_T2.unsqueeze(2).float() * (1.0 / cfg.rope_theta**exponent)
    angle_Th = angle_T2h.flatten(1)
    return torch.cat((angle_Th.cos(), angle_Th.sin()), dim=1)


def attention(
    cfg: TowerConfig,
    max_len: int,
    w: TowerAttentionWeights,
    rope_TH: Tensor | None,
    start_S: Tensor,
    x_TD: Tensor,
    h_TD: Tensor,
) -> Tensor:
    """h + attention of the normalised x within segments. Without a table nothing is rotated."""
    qkv_TE = ops.linear(x_TD, w.qkv_ED, w.qkv_bias_E)
    num_patches = qkv_TE.shape[0]
    q_TNH, k_TNH, v_TNH = qkv_TE.view(num_patches, 3, cfg.num_heads, cfg.head_dim).unbind(1)
    if rope_TH is not None:
        # the rotary op looks up rows of the table by position: here each patch has its own row
        row_T = torch.arange(num_patches, device=x_TD.device)
        q_TNH, k_TNH = (ops.rope(x_TNH, rope_TH, row_T) for x_TNH in (q_TNH, k_TNH))
    scale = cfg.head_dim**-0.5
    o_TNH = ops.varlen_attention(q_TNH, k_TNH, v_TNH, start_S, max_len, scale)
    return ops.linear(o_TNH.flatten(1), w.out_DD, w.out_bias_D, h_TD)


def merge_groups(w: Merger, x_GM: Tensor) -> Tensor:
    """The MLP that makes tokens [G, O] of the normalised patches of groups."""
    x_GM = torch.nn.functional.gelu(ops.linear(x_GM, w.up_MM, w.up_bias_M))
    return ops.linear(x_GM, w.down_OM, w.down_bias_O)


# parameters --------------------------------------------------------------------------------------


def patch_param(cfg: TowerConfig) -> Param:
    return Param.one("conv", "patch_embed.proj.weight", cfg.hidden_size, *cfg.patch_shape)


def product(name: str, dims: str, source: str, rows: int, columns: int) -> dict[str, Param]:
    """A product with a bias: the fields NAME_dims and NAME_bias_dims[0]."""
    return {
        f"{name}_{dims}": Param.one("linear", f"{source}.weight", rows, columns),
        f"{name}_bias_{dims[0]}": Param.one("bias", f"{source}.bias", rows),
    }


def norm_params(name: str, dims: str, source: str, size: int) -> dict[str, Param]:
    """A layer norm: the fields NAMEdims and NAME_biasdims."""
    return {
        f"{name}{dims}": Param.one("norm", f"{source}.weight", size),
        f"{name}_bias{dims}": Param.one("bias", f"{source}.bias", size),
    }


def attention_params(cfg: TowerConfig, block_idx: int) -> dict[str, Param]:
    """Parameters by the fields of `TowerAttentionWeights`."""
    prefix, hidden = f"blocks.{block_idx}.attn.", cfg.hidden_size
    return {
        **product("qkv", "ED", prefix + "qkv", 3 * hidden, hidden),
        **product("out", "DD", prefix + "proj", hidden, hidden),
    }


def merging_params(cfg: TowerConfig, up: str, down: str) -> dict[str, Param]:
    """A merger without its norm; `up` and `down` are the names of its products."""
    merged = cfg.patches_per_group * cfg.hidden_size
    return {
        **product("up", "MM", up, merged, merged),
        **product("down", "OM", down, cfg.out_size, merged),
    }


# configs -----------------------------------------------------------------------------------------


def common_fields(vision: Any, architecture: str, activation: str) -> dict[str, Any]:
    """Fields of `TowerConfig` that all of transformers' vision configs spell alike.

    Raises ValueError for settings that no region computes.
    """
    if vision.hidden_act != activation:
        raise ValueError(
            f"hidden_act {vision.hidden_act!r} of the vision tower is not supported by "
            f"{architecture}: only {activation!r} is"
        )
    rope = getattr(vision, "rope_parameters", None) or {}
    if rope.get("rope_type", "axial") != "axial":
        raise ValueError(
            f"rope_type {rope['rope_type']!r} of the vision tower is not supported: only 'axial' is"
        )
    sizes = {name: getattr(vision, name) for name in ("patch_size", "temporal_patch_size")}
    for name, value in sizes.items():
        if not isinstance(value, int):
            raise ValueError(f"{name} of the vision tower is {value!r}: it must be one number")
    side = sizes["patch_size"]
    return {
        "architecture": architecture,
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "ffn_size": vision.intermediate_size,
        "out_size": vision.out_hidden_size,
        "patch_shape": (vision.in_channels, sizes["temporal_patch_size"], side, side),
        "merge_size": vision.spatial_merge_size,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
    }
