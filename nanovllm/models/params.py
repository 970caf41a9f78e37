"""Where every parameter is declared: its shape, its tensors in the checkpoint, and the axis along which ranks share it."""

from __future__ import annotations

from typing import NamedTuple

from nanovllm.models.config import ModelConfig


class Param(NamedTuple):
    """One parameter: the checkpoint's tensors `sources` stacked along axis 0 give `shape`.

    `parts` are the row counts of the sources; `shard_axis` is the axis that tensor parallelism splits (each source by
    itself along axis 0), None for a replicated parameter.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    parts: tuple[int, ...]
    shard_axis: int | None


def _one(source: str, *shape: int, shard_axis: int | None = None) -> Param:
    return Param(shape, (source,), (shape[0],), shard_axis)


def _stack(sources: tuple[str, ...], parts: tuple[int, ...], *rest: int) -> Param:
    return Param((sum(parts), *rest), sources, parts, 0)


def layer_params(cfg: ModelConfig, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the field names of `dense.Layer`; absent ones are None there."""
    prefix = f"model.layers.{layer_idx}."
    attn, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv_names, gate_up_names = (
        tuple(attn + f"{c}_proj" for c in "qkv"),
        (mlp + "gate_proj", mlp + "up_proj"),
    )
    q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    qkv_parts, gate_up_parts = (q_size, kv_size, kv_size), (cfg.ffn_size, cfg.ffn_size)

    def weight(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name + ".weight" for name in names)

    def bias(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name + ".bias" for name in names)

    declared = {
        "attn_norm_D": _one(prefix + "input_layernorm.weight", cfg.hidden_size),
        "qkv_ED": _stack(weight(qkv_names), qkv_parts, cfg.hidden_size),
        "out_DQ": _one(attn + "o_proj.weight", cfg.hidden_size, q_size, shard_axis=1),
        "mlp_norm_D": _one(prefix + "post_attention_layernorm.weight", cfg.hidden_size),
        "gate_up_GD": _stack(weight(gate_up_names), gate_up_parts, cfg.hidden_size),
        "down_DF": _one(mlp + "down_proj.weight", cfg.hidden_size, cfg.ffn_size, shard_axis=1),
    }
    if cfg.qkv_bias:
        declared["qkv_bias_E"] = _stack(bias(qkv_names), qkv_parts)
    if cfg.out_bias:
        declared["out_bias_D"] = _one(attn + "o_proj.bias", cfg.hidden_size)
    if cfg.qk_norm:
        declared["q_norm_H"] = _one(attn + "q_norm.weight", cfg.head_dim)
        declared["k_norm_H"] = _one(attn + "k_norm.weight", cfg.head_dim)
    if cfg.mlp_bias:
        declared["gate_up_bias_G"] = _stack(bias(gate_up_names), gate_up_parts)
        declared["down_bias_D"] = _one(mlp + "down_proj.bias", cfg.hidden_size)
    return declared


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """Parameters outside the layers, by the field names of `dense.Params`; a tied head is not declared."""
    declared = {
        "embed_VD": _one(
            "model.embed_tokens.weight", cfg.vocab_size, cfg.hidden_size, shard_axis=0
        ),
        "final_norm_D": _one("model.norm.weight", cfg.hidden_size),
    }
    if not cfg.tied_embeddings:
        declared["head_VD"] = _one("lm_head.weight", cfg.vocab_size, cfg.hidden_size, shard_axis=0)
    return declared
