"""The vision tower of Gemma 4: norms before and after attention and MLP, two rotations of each half
of a head, learned positions of rows and columns, and groups of m² patches averaged to one token.

With clipped products, the inputs and the results of each are kept within bounds that the checkpoint
has. Letters are in `interface`; S positions of a learned table | X products of a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from nanovllm.kernels import ops
from nanovllm.kernels.reference.norm_act import gelu_mul
from nanovllm.models.model import Param
from nanovllm.models.vision.vision_encoder import FrameLayout, Tower, TowerConfig

NAME = "Gemma4ForConditionalGeneration"
MODULES = ("vision_tower.", "embed_vision.")
PRODUCTS = (
    *(f"self_attn.{one}_proj" for one in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


class Embedder(NamedTuple):
    """The weights before the first block: of patches [rows, columns, colours], and of positions."""

    patch_DC: Tensor
    table_2SD: Tensor


class Gemma4Block(NamedTuple):
    """Weights of one block. `bounds_X4` are BOUNDS of PRODUCTS."""

    attn_norm_D: Tensor
    qkv_ED: Tensor
    q_norm_H: Tensor
    k_norm_H: Tensor
    out_DD: Tensor
    after_attn_norm_D: Tensor
    mlp_norm_D: Tensor
    gate_up_GD: Tensor
    down_DF: Tensor
    after_mlp_norm_D: Tensor
    bounds_X4: Tensor | None


class Projector(NamedTuple):
    """The weights after the last block."""

    bias_D: Tensor | None
    scale_D: Tensor | None
    proj_OD: Tensor


def tower(vision: Any, dtype: torch.dtype) -> Tower:
    """The tower of transformers' `Gemma4VisionConfig`, with the text model's `out_hidden_size`.
    Raises ValueError for settings that no region computes."""
    _refuse(vision)
    rope = vision.rope_parameters or {}
    config = TowerConfig(
        architecture=NAME,
        depth=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        num_heads=vision.num_attention_heads,
        ffn_size=vision.intermediate_size,
        out_size=vision.out_hidden_size,
        patch_shape=(3, 1, vision.patch_size, vision.patch_size),
        merge_size=vision.pooling_kernel_size,
        full_blocks=tuple(range(vision.num_hidden_layers)),
        max_side=vision.position_embedding_size,
        is_clipped=bool(vision.use_clipped_linears),
        standardizes=bool(vision.standardize),
        rope_theta=float(rope.get("rope_theta", 100.0)),
        norm_eps=vision.rms_norm_eps,
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
        block_type=Gemma4Block,
        prefixes=("model.",),
        modules=MODULES,
        outer_type=Embedder,
        merger_type=Projector,
    )


def _refuse(vision: Any) -> None:
    if vision.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_activation {vision.hidden_activation!r} of the vision tower is not supported "
            f"by {NAME}: only 'gelu_pytorch_tanh' is"
        )
    num_heads = vision.num_attention_heads
    if vision.num_key_value_heads != num_heads:
        raise ValueError(
            f"num_key_value_heads {vision.num_key_value_heads} of the vision tower is not "
            f"supported: only num_attention_heads, {num_heads}, is"
        )
    if vision.head_dim * num_heads != vision.hidden_size or vision.head_dim % 16:
        raise ValueError(
            f"head_dim {vision.head_dim} of the vision tower is not supported: it must be a "
            f"multiple of 16, and {num_heads} heads the hidden_size {vision.hidden_size}"
        )
    rope_type = (vision.rope_parameters or {}).get("rope_type", "axial")
    if rope_type != "axial":
        raise ValueError(
            f"rope_type {rope_type!r} of the vision tower is not supported: only 'axial' is"
        )


# regions -----------------------------------------------------------------------------------------


def embed(
    cfg: TowerConfig, w: Embedder, layout: FrameLayout, pixel_TC: Tensor
) -> tuple[Tensor, Tensor]:
    """Patches to the hidden state [T, D] with learned positions, and the rotary tables [T, H]:
    [cos | sin] of a patch's column, then of its row."""
    side = math.isqrt(w.patch_DC.shape[1] // 3)
    # pixels come colour by colour
    weight_DC = w.patch_DC.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).flatten(1)
    row_T, col_T = layout.row_col_T2.unbind(1)
    x_SD, y_SD = w.table_2SD.unbind(0)
    last = len(x_SD) - 1  # the frame of padding may be longer than images
    h_TD = ops.linear(pixel_TC, weight_DC, None) + embedding(col_T.clamp(max=last), x_SD)
    h_TD = h_TD + embedding(row_T.clamp(max=last), y_SD)
    width = cfg.head_dim // 2
    exponent = torch.arange(0, width, 2, device=row_T.device).float() / width
    angles = [at_T.float().unsqueeze(1) / cfg.rope_theta**exponent for at_T in (col_T, row_T)]
    return h_TD, torch.cat([one for a_Th in angles for one in (a_Th.cos(), a_Th.sin())], dim=1)


def block(
    cfg: TowerConfig, max_len: int, w: Gemma4Block, rope_TH: Tensor, start_S: Tensor, h_TD: Tensor
) -> Tensor:
    """One block; segments are frames, of at most `max_len` patches."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    qkv_TE = clipped(x_TD, w.qkv_ED, w.bounds_X4, 0, 3)
    q_TNH, k_TNH, v_TNH = qkv_TE.view(qkv_TE.shape[0], 3, cfg.num_heads, cfg.head_dim).unbind(1)
    q_TNH = rotated(ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps), rope_TH)
    k_TNH = rotated(ops.rms_norm(k_TNH, w.k_norm_H, cfg.norm_eps), rope_TH)
    v32 = v_TNH.float()
    v_TNH = (v32 * torch.rsqrt(v32.square().mean(-1, keepdim=True) + cfg.norm_eps)).to(h_TD.dtype)
    o_TNH = ops.varlen_attention(q_TNH, k_TNH, v_TNH, start_S, max_len, 1.0)
    a_TD = clipped(o_TNH.flatten(1), w.out_DD, w.bounds_X4, 3)
    h_TD = h_TD + ops.rms_norm(a_TD, w.after_attn_norm_D, cfg.norm_eps)
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    inner_TF = gelu_mul(clipped(x_TD, w.gate_up_GD, w.bounds_X4, 4, 2))
    m_TD = clipped(inner_TF, w.down_DF, w.bounds_X4, 6)
    return h_TD + ops.rms_norm(m_TD, w.after_mlp_norm_D, cfg.norm_eps)


def clipped(
    x_TI: Tensor, weight_OI: Tensor, bounds_X4: Tensor | None, first: int, num: int = 1
) -> Tensor:
    """The `num` products with equal parts of a weight's rows, the first of which has this number:
    inputs and results within their bounds, if there are any."""
    if bounds_X4 is None:
        return ops.linear(x_TI, weight_OI, None)
    found = []
    for i, part_OI in enumerate(weight_OI.chunk(num)):
        in_min, in_max, out_min, out_max = bounds_X4[first + i].unbind(0)
        y_TO = ops.linear(torch.clamp(x_TI, in_min, in_max), part_OI, None)
        found.append(torch.clamp(y_TO, out_min, out_max))
    return torch.cat(found, dim=1)


def rotated(x_TNH: Tensor, rope_TH: Tensor) -> Tensor:
    """The first half of each head rotated by the patch's column, the second by its row."""
    row_T = torch.arange(x_TNH.shape[0], device=x_TNH.device)
    halves = zip(x_TNH.chunk(2, dim=2), rope_TH.chunk(2, dim=1))
    return torch.cat([ops.rope(x, table.contiguous(), row_T) for x, table in halves], dim=2)


def merge(cfg: TowerConfig, w: Projector, place_G: None, h_TD: Tensor) -> Tensor:
    """Tokens [G, O]: the mean of each group's patches times √D, perhaps standardized, normalised
    and in the text model's size."""
    mean_GD = h_TD.float().unflatten(0, (-1, cfg.merge_size**2)).mean(1).to(h_TD.dtype)
    token_GD = mean_GD.float() * math.sqrt(h_TD.shape[1])
    if w.bias_D is not None and w.scale_D is not None:
        token_GD = (token_GD - w.bias_D.float()) * w.scale_D.float()
    token_GD = token_GD.to(h_TD.dtype).float()
    norm_G1 = torch.rsqrt(token_GD.square().mean(-1, keepdim=True) + cfg.norm_eps)
    return ops.linear((token_GD * norm_G1).to(h_TD.dtype), w.proj_OD, None)


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: TowerConfig) -> dict[str, Param]:
    prefix, hidden = "vision_tower.patch_embedder.", cfg.hidden_size
    table = prefix + "position_embedding_table"
    return {
        "patch_DC": Param.one("linear", prefix + "input_proj.weight", hidden, cfg.patch_size),
        "table_2SD": Param.one("table", table, 2, cfg.max_side, hidden),
    }


def block_params(cfg: TowerConfig, block_idx: int) -> dict[str, Param]:
    """Parameters of one block, by the fields of `Gemma4Block`."""
    prefix, hidden = f"vision_tower.encoder.layers.{block_idx}.", cfg.hidden_size
    names = [f"{prefix}{one}.linear.weight" for one in PRODUCTS]

    def norm(source: str, size: int = hidden) -> Param:
        return Param.one("norm", f"{prefix}{source}.weight", size)

    declared = {
        "attn_norm_D": norm("input_layernorm"),
        "qkv_ED": Param.stack("linear", tuple(names[:3]), (hidden,) * 3, hidden),
        "q_norm_H": norm("self_attn.q_norm", cfg.head_dim),
        "k_norm_H": norm("self_attn.k_norm", cfg.head_dim),
        "out_DD": Param.one("linear", names[3], hidden, hidden),
        "after_attn_norm_D": norm("post_attention_layernorm"),
        "mlp_norm_D": norm("pre_feedforward_layernorm"),
        "gate_up_GD": Param.stack("linear", tuple(names[4:6]), (cfg.ffn_size,) * 2, hidden),
        "down_DF": Param.one("linear", names[6], hidden, cfg.ffn_size),
        "after_mlp_norm_D": norm("post_feedforward_layernorm"),
    }
    if cfg.is_clipped:
        sources = tuple(f"{prefix}{one}.{bound}" for one in PRODUCTS for bound in BOUNDS)
        declared["bounds_X4"] = Param(
            "norm", (len(PRODUCTS), len(BOUNDS)), sources, (1,) * len(sources), None,
            source_shape=(),
        )  # fmt: skip
    return declared


def merger_params(cfg: TowerConfig, level: int) -> dict[str, Param]:
    """Parameters after the last block, by the fields of `Projector`."""
    hidden, source = cfg.hidden_size, "embed_vision.embedding_projection.weight"
    declared = {"proj_OD": Param.one("linear", source, cfg.out_size, hidden)}
    if cfg.standardizes:
        declared["bias_D"] = Param.one("bias", "vision_tower.std_bias", hidden)
        declared["scale_D"] = Param.one("norm", "vision_tower.std_scale", hidden)
    return declared
