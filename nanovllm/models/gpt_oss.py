"""gpt-oss (20b, 120b): experts in every layer, windows in every second one, attention with sinks.

Each head has a learned score that joins the denominator of its softmax. The experts have biases and
a clamped SwiGLU, in the checkpoint in MXFP4 (`formats.fp4.MxFp4Experts`) or in the model's dtype.
E experts, other letters as in `dense` and `moe`. Source: OpenAI 2025, https://arxiv.org/abs/2508.10925.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import (
    ModelConfig,
    MoeConfig,
    dense_config,
    require_type,
    windows_by_layer_type,
)
from nanovllm.models.experts.clamped import Activation, Clamped, apply
from nanovllm.models.formats import Weight, linear
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.scaled import check_factor

NAME = "GptOssForCausalLM"
DEFAULT = Activation(alpha=1.702, limit=7.0)  # older versions of transformers have no other


@dataclass(frozen=True)
class GptOssConfig(ModelConfig):
    """`activation` is that of the experts."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*ModelConfig.GRAPH_FIELDS, "activation")

    activation: Activation = DEFAULT


class GptOssLayer(NamedTuple):
    """Weights of one decoder layer."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    sinks_N: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    router_ED: Tensor
    router_bias_E: Tensor
    experts: Clamped


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `GptOssConfig`. Raises ValueError for settings that this engine
    does not support."""
    require_type(hf, NAME, "gpt_oss")
    activation = Activation(
        getattr(hf, "swiglu_alpha", DEFAULT.alpha), getattr(hf, "swiglu_limit", DEFAULT.limit)
    )
    for name, value in zip(("swiglu_alpha", "swiglu_limit"), activation):
        check_factor(name, value)
    windows = windows_by_layer_type(hf)
    if "sliding_attention" in (hf.layer_types or ()) and not any(windows):
        raise ValueError(
            f"sliding_window is {hf.sliding_window}: it must be at least 1 for layer_types "
            "'sliding_attention'"
        )
    moe = MoeConfig(
        num_experts=hf.num_local_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.intermediate_size,
        normalize=True,  # the softmax of the chosen scores is that of all scores, normalised
    )
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        moe=moe,
    )
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    kinds = tuple(
        LayerKind(f"window{window}", dense.paged_kv(config, window), sparse=True, has_sinks=True)
        for window in windows
    )
    return Model(
        config=GptOssConfig(**values, activation=activation),
        layer_kinds=kinds,
        embed=dense.embed,
        layer=layer,
        head=dense.head,
        outer_params=dense.outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: GptOssConfig,
    call: LayerCall,
    w: GptOssLayer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    qkv = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, qkv, w.sinks_N)
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    h_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)
    return sparse_mlp(cfg, w, h_TD)


def sparse_mlp(cfg: GptOssConfig, w: GptOssLayer, h_TD: Tensor) -> Tensor:
    """The second half of a layer: h + experts of the normalised h."""
    assert cfg.moe is not None
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    logits_TE = ops.linear(x_TD, w.router_ED, w.router_bias_E)
    weight_TK, expert_TK = ops.topk_softmax(logits_TE, cfg.moe.top_k, cfg.moe.normalize)
    residual_TD = h_TD if cfg.num_ranks == 1 else None
    sum_TD = apply(x_TD, weight_TK, expert_TK, w.experts, cfg.activation, residual_TD)
    return sum_TD if cfg.num_ranks == 1 else ops.all_reduce(sum_TD, h_TD)


def kv_scales(cfg: ModelConfig, w: GptOssLayer) -> tuple[Tensor, Tensor]:
    """See `dense.kv_scales`."""
    return bounds.kv_scales(cfg, w.attn_norm_D, w.qkv_ED, w.qkv_bias_E, None)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[GptOssLayer]:
    return GptOssLayer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `GptOssLayer` and of `Clamped`.

    Raises ValueError for experts that are compressed.
    """
    assert cfg.moe is not None
    if cfg.moe.compression is not None:
        raise ValueError(
            f"compressed experts beside the checkpoint are not supported for {NAME}, whose experts "
            "have biases: set NANOVLLM_DISABLE_SVD=1"
        )
    prefix = f"model.layers.{layer_idx}."
    sinks = Param.one("bias", prefix + "self_attn.sinks", cfg.num_heads, shard_axis=0)
    router = prefix + "mlp.router."
    num = cfg.moe.num_experts
    return {
        **dense.attention_params(cfg, layer_idx),
        "sinks_N": sinks,
        "router_ED": Param.one("router", router + "weight", num, cfg.hidden_size),
        "router_bias_E": Param.one("bias", router + "bias", num),
        **expert_params(cfg, cfg.moe, prefix + "mlp.experts."),
    }


def expert_params(cfg: ModelConfig, moe: MoeConfig, prefix: str) -> dict[str, Param]:
    """A layer's experts by the fields of `Clamped`.

    The checkpoint has all of them in one tensor for each field, in which the rows of gate and up
    take turns. The other names are of no tensor.
    """
    num, size, hidden = moe.num_experts, moe.expert_size, cfg.hidden_size

    def matrices(name: str, per_expert: int, rows: int, columns: int, axis: int) -> Param:
        sources = tuple(f"{prefix}{e}.{name}.{i}" for e in range(num) for i in range(per_expert))
        shape = (num, per_expert * rows, columns)
        parts = (rows,) * len(sources)
        found = Param("experts", shape, sources, parts, axis, prefix + name, is_interleaved=True)
        if moe.is_expert_parallel:
            return found._replace(shard_axis=None, is_expert_parallel=True)
        return found

    def bias(name: str, width: int) -> Param:
        if not moe.is_expert_parallel:
            return Param("bias", (num, width), (prefix + name,), (num,), None)
        sources = tuple(f"{prefix}{e}.{name}" for e in range(num))
        return Param(
            "bias", (num, width), sources, (1,) * num, None, prefix + name, is_expert_parallel=True
        )

    gate_up_bias = bias("gate_up_proj_bias", 2 * size)._replace(adapt=apart)
    down_bias = bias("down_proj_bias", hidden)
    if not moe.is_expert_parallel:
        gate_up_bias = gate_up_bias._replace(shard_axis=1, units=(size,))
        down_bias = down_bias._replace(is_first_only=True)
    declared = {
        "gate_up_EGD": matrices("gate_up_proj", 2, size, hidden, 0),
        "gate_up_bias_EG": gate_up_bias,
        "down_EDF": matrices("down_proj", 1, hidden, size, 1),
        "down_bias_ED": down_bias,
    }
    if moe.is_expert_parallel:
        declared["local_X"] = Param("places", (num,), (), (), None)
    return declared


def apart(bias_EG: Tensor, parts: tuple[int, ...]) -> None:
    """Puts the biases of gate before those of up, with which they take turns."""
    bias_EG.copy_(torch.cat((bias_EG[:, ::2], bias_EG[:, 1::2]), dim=1))
