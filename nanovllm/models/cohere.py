"""Command R: attention and MLP of one layer norm, side by side, and a factor on the logits.

Neighbouring elements of a head are rotated. The letters of shapes are those of `dense`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.formats import Weight, linear
from nanovllm.models.head_order import rotated_as_ops_do
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.rope import grouped_rows
from nanovllm.models.scaled import Factors, check_factor

NAME = "CohereForCausalLM"


class CohereLayer(NamedTuple):
    """Weights of one decoder layer. Each head has a row of the norms of queries and keys."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_NH: Tensor | None
    k_norm_KH: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    gate_up_GD: Weight
    down_DF: Weight


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `CohereConfig`."""
    require_type(hf, NAME, "cohere")
    config = cohere_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qk_norm=bool(hf.use_qk_norm),
    )
    return cohere_model(dense.dense_model(config), hf)


def cohere_config(hf: Any, **fields: Any) -> ModelConfig:
    """The config of a model of this family. `fields` are those of `dense_config`."""
    check_factor("layer_norm_eps", hf.layer_norm_eps)
    return dense_config(
        hf,
        norm_eps=hf.layer_norm_eps,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        **fields,
    )


def cohere_model(plain: Model, hf: Any) -> Model:
    """A dense model with the layers of this family."""
    factors = Factors(head=("logit_scale", hf.logit_scale))
    return replace(
        plain,
        layer=layer,
        head=head,
        outer_params=factors.outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: CohereLayer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`. On several ranks there is one sum."""
    x_TD = ops.layer_norm(h_TD, w.attn_norm_D, None, cfg.norm_eps)
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    if w.q_norm_NH is not None and w.k_norm_KH is not None:
        q_TNH = ops.layer_norm(q_TNH, w.q_norm_NH, None, cfg.norm_eps)
        k_TKH = ops.layer_norm(k_TKH, w.k_norm_KH, None, cfg.norm_eps)
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, x_TD, h_TD = dense.kept(batch, o_TQ, x_TD, h_TD)
    inner_TF = ops.silu_mul(linear(x_TD, w.gate_up_GD, None))
    added_TD = h_TD if cfg.num_ranks == 1 else None
    sum_TD = linear(inner_TF, w.down_DF, None, linear(o_TQ, w.out_DQ, w.out_bias_D, added_TD))
    return sum_TD if cfg.num_ranks == 1 else ops.all_reduce(sum_TD, h_TD)


def head(cfg: ModelConfig, final_norm_D: Tensor, head_VD: Weight, h_RD: Tensor) -> Tensor:
    """`dense.head` with a layer norm."""
    return linear(ops.layer_norm(h_RD, final_norm_D, None, cfg.norm_eps), head_VD, None)


def kv_scales(cfg: ModelConfig, w: CohereLayer) -> tuple[Tensor, Tensor]:
    """See `dense.kv_scales`: a layer norm gives vectors of the same largest length."""
    return bounds.kv_scales(cfg, w.attn_norm_D, w.qkv_ED, w.qkv_bias_E, w.k_norm_KH)


# parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnOrder:
    """Puts the elements of each head of a norm in the order `row_H`."""

    row_H: tuple[int, ...]

    def __call__(self, weight_NH: Tensor, parts: tuple[int, ...]) -> None:
        weight_NH.copy_(weight_NH[:, list(self.row_H)])


def layer_type(kind: LayerKind) -> type[CohereLayer]:
    return CohereLayer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `CohereLayer`."""
    declared = dense.layer_params(replace(cfg, qk_norm=False), kind, layer_idx)
    del declared["mlp_norm_D"]
    prefix = f"model.layers.{layer_idx}.self_attn."
    norms = {"q_norm_NH": ("q", cfg.num_heads), "k_norm_KH": ("k", cfg.num_kv_heads)}
    order = ColumnOrder(grouped_rows(cfg.head_dim, cfg.head_dim, interleaved=True))
    for name, (which, num) in norms.items() if cfg.qk_norm else ():
        source = f"{prefix}{which}_norm.weight"
        param = Param.one("norm", source, num, cfg.head_dim, shard_axis=0)
        declared[name] = param._replace(units=(num,), adapt=order)
    return rotated_as_ops_do(cfg, declared, interleaved=True)
