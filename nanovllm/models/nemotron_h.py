"""Nemotron-H: each layer is a Mamba-2 mixer, attention without positions, an MLP, or experts.

An MLP has no gate: its activation is relu². So it is with experts (`ungated_moe`).

The letters of shapes are those of `dense` and `mamba2`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, ungated_moe
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.experts.ungated import relu2
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import LayerState, PagedKV, Recurrent
from nanovllm.models.mamba2 import Mamba2, Mamba2Config, mixed, mixer_params, of_config
from nanovllm.models.model import (
    Batch,
    CacheAndStates,
    Kept,
    LatentCache,
    LayerCache,
    LayerCall,
    LayerKind,
    Model,
    Param,
)
from nanovllm.models.scaled import check_factor
from nanovllm.models.ungated_moe import NemotronConfig, SparseLayer

NAME = "NemotronHForCausalLM"
MAMBA, ATTENTION, MLP, MOE = "linear_attention", "full_attention", "mlp", "moe"
MAMBA_TYPE, MLP_TYPE = "silu", "relu2"


class MambaLayer(NamedTuple):
    """Weights of a layer with a mixer."""

    norm_D: Tensor
    in_JD: Weight
    in_bias_J: Tensor | None
    conv_C1W: Tensor
    conv_bias_C: Tensor | None
    a_log_V: Tensor
    dt_bias_V: Tensor
    skip_V: Tensor
    gate_norm_P: Tensor | None
    mixed_DP: Weight
    mixed_bias_D: Tensor | None


class AttentionLayer(NamedTuple):
    """Weights of a layer with attention."""

    norm_D: Tensor
    qkv_ED: Weight
    out_DQ: Weight


class MlpLayer(NamedTuple):
    """Weights of a layer that is an MLP."""

    norm_D: Tensor
    up_FD: Weight
    up_bias_F: Tensor | None
    down_DF: Weight
    down_bias_D: Tensor | None


Layer = MambaLayer | AttentionLayer | MlpLayer | SparseLayer


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `NemotronHConfig`."""
    require_type(hf, NAME, "nemotron_h")
    _refuse(hf)
    check_factor("layer_norm_epsilon", hf.layer_norm_epsilon)
    still = copy.copy(hf)  # nothing is rotated: no region reads the table
    still.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    still.num_hidden_layers = len(hf.layers_block_type)
    config = dense_config(
        still,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        norm_eps=hf.layer_norm_epsilon,
        mlp_bias=hf.mlp_bias,
        moe=ungated_moe.moe_config(hf) if MOE in hf.layers_block_type else None,
    )
    # transformers has a head of its own, whatever tie_word_embeddings is
    values = {**vars(config), "tied_embeddings": False}
    if config.moe is not None:
        values["latent_size"] = ungated_moe.latent_size(hf)
    config = NemotronConfig(**values, mamba=mixer(hf))
    keeps: dict[str, LayerState] = {
        MAMBA: mixer(hf).keeps,
        ATTENTION: dense.paged_kv(config),
        MLP: Recurrent(()),  # nothing
        MOE: Recurrent(()),
    }
    kinds = {name: LayerKind(name, kept, name == MOE) for name, kept in keeps.items()}
    return Model(
        config=config,
        layer_kinds=tuple(kinds[name] for name in hf.layers_block_type),
        embed=dense.embed,
        layer=layer,
        head=dense.head,
        outer_params=outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
        read_elsewhere=("mtp.",),  # layers that propose tokens
    )


def _refuse(hf: Any) -> None:
    """Raise ValueError for what no region computes."""
    if unknown := set(hf.layers_block_type) - {MAMBA, ATTENTION, MLP, MOE}:
        raise ValueError(
            f"layers_block_type {sorted(unknown)} of {NAME} is not supported: only {MAMBA!r}, "
            f"{ATTENTION!r}, {MLP!r} and {MOE!r} are"
        )
    for name, own in (("mamba_hidden_act", MAMBA_TYPE), ("mlp_hidden_act", MLP_TYPE)):
        if (found := getattr(hf, name)) != own:
            raise ValueError(f"{name} {found!r} is not supported by {NAME}: only {own!r} is")


def mixer(hf: Any) -> Mamba2:
    """The sizes of the mixers.

    transformers limits time steps by `time_step_min`, which is a value for initialisation: the
    published code of these models, and llama.cpp, do not.
    """
    dt_min, dt_max = hf.time_step_limit or (0.0, float("inf"))
    return Mamba2(
        num_heads=hf.mamba_num_heads,
        head_size=hf.mamba_head_dim,
        num_groups=hf.n_groups,
        state_size=hf.ssm_state_size,
        num_taps=hf.conv_kernel,
        dt_min=dt_min,
        dt_max=dt_max,
        in_bias=hf.use_bias,
        conv_bias=hf.use_conv_bias,
        out_bias=hf.use_bias,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: Mamba2Config,
    call: LayerCall,
    w: Layer,
    kv: Kept,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One layer: see `dense.layer`."""
    if isinstance(w, SparseLayer):
        return ungated_moe.layer(cfg, w, batch, h_TD)
    if isinstance(w, MlpLayer):
        (h_TD,) = dense.kept(batch, h_TD)
    x_TD = ops.rms_norm(h_TD, w.norm_D, cfg.norm_eps)
    if isinstance(w, MlpLayer):
        inner_TF = relu2(linear(x_TD, w.up_FD, w.up_bias_F))
        return dense.summed_linear(cfg, inner_TF, w.down_DF, w.down_bias_D, h_TD)
    if isinstance(w, AttentionLayer):
        assert isinstance(kv, LayerCache)
        q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(x_TD, w.qkv_ED, None))
        qkv = (q_TNH.contiguous(), k_TKH, v_TKH)
        o_TQ, h_TD = dense.kept(batch, dense.attend_rotated(cfg, call, kv, batch, qkv), h_TD)
        return dense.summed_linear(cfg, o_TQ, w.out_DQ, None, h_TD)
    assert not isinstance(kv, LayerCache | LatentCache | CacheAndStates)
    y_TP, h_TD = dense.kept(batch, mixed(cfg, call, w, kv, batch, x_TD), h_TD)
    return dense.summed_linear(cfg, y_TP, w.mixed_DP, w.mixed_bias_D, h_TD)


def kv_scales(cfg: ModelConfig, w: AttentionLayer) -> tuple[Tensor, Tensor]:
    """The scales of one layer's fp8 cache: [K] fp32 for keys, and for values."""
    return bounds.kv_scales(cfg, w.norm_D, w.qkv_ED, None, None)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Layer]:
    if isinstance(kind.keeps, PagedKV):
        return AttentionLayer
    assert isinstance(kind.keeps, Recurrent)
    if kind.sparse:
        return SparseLayer
    return MambaLayer if kind.keeps.tensors else MlpLayer


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """`dense.outer_params`, with the names of these checkpoints."""
    names = {
        "embed_VD": "model.embeddings.weight",
        "final_norm_D": "model.norm_f.weight",
        "head_VD": "lm_head.weight",
    }
    declared = dense.outer_params(cfg)
    return {name: declared[name]._replace(sources=(own,)) for name, own in names.items()}


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one layer, by the fields of `layer_type(kind)`."""
    prefix, hidden = f"model.layers.{layer_idx}.", cfg.hidden_size
    mixer_prefix, found = prefix + "mixer.", layer_type(kind)
    norm = {"norm_D": Param.one("norm", prefix + "norm.weight", hidden)}
    if found is AttentionLayer:
        return norm | attention_params(cfg, mixer_prefix)
    if found is SparseLayer:
        return norm | ungated_moe.layer_params(cfg, mixer_prefix)
    if found is MlpLayer:
        return norm | mlp_params(cfg, mixer_prefix)
    mamba = of_config(cfg)
    out = mixer_prefix + "out_proj."
    declared = {
        **norm,
        **mixer_params(cfg, mixer_prefix),
        "mixed_DP": Param.one("linear", out + "weight", hidden, mamba.values, shard_axis=1),
    }
    if mamba.out_bias:
        declared["mixed_bias_D"] = dense.summed_bias(out + "bias", hidden)
    return declared


def attention_params(cfg: ModelConfig, prefix: str) -> dict[str, Param]:
    """The products of a layer with attention."""
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    parts = tuple(num * cfg.head_dim for num in heads)
    names = tuple(f"{prefix}{c}_proj.weight" for c in "qkv")
    out = (cfg.hidden_size, parts[0])
    return {
        "qkv_ED": Param.stack("linear", names, parts, cfg.hidden_size)._replace(units=heads),
        "out_DQ": Param.one("linear", prefix + "o_proj.weight", *out, shard_axis=1),
    }


def mlp_params(cfg: ModelConfig, prefix: str) -> dict[str, Param]:
    """The products of a layer that is an MLP."""
    up, down, hidden, ffn = (
        prefix + "up_proj.",
        prefix + "down_proj.",
        cfg.hidden_size,
        cfg.ffn_size,
    )
    declared = {
        "up_FD": Param.one("linear", up + "weight", ffn, hidden, shard_axis=0),
        "down_DF": Param.one("linear", down + "weight", hidden, ffn, shard_axis=1),
    }
    if cfg.mlp_bias:
        declared["up_bias_F"] = Param.one("bias", up + "bias", ffn, shard_axis=0)
        declared["down_bias_D"] = dense.summed_bias(down + "bias", hidden)
    return declared
