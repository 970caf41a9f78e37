"""Gemma 4: dense (31B), with experts (26B-A4B), and small with inputs of layers and shared
caches (E2B, E4B). Its layers are in `gemma4_layer`, its vision tower in `vision.gemma4`."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.models import dense, gemma3, gemma4_layer
from nanovllm.models.config import MoeConfig, Rope, dense_config, require_type
from nanovllm.models.gemma4_layer import Gemma4Config
from nanovllm.models.layer_ropes import FULL, SLIDING
from nanovllm.models.model import LayerKind, Model
from nanovllm.models.scaled import check_factor
from nanovllm.models.vision import registry
from nanovllm.models.vision.vision_encoder import Tower

NAME = "Gemma4ForCausalLM"
ENCODERS = (  # of images and of sound, which is not read
    "model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.",
)  # fmt: skip
MEDIA_TOKENS = ("image_token_id", "video_token_id", "audio_token_id")


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Gemma4TextConfig`, also where it is a part of a `Gemma4Config`.

    Raises ValueError for settings that this engine does not support.
    """
    require_type(hf, NAME, "gemma4_text")
    _refuse(hf)
    sliding, full = (_of_type(hf, layer_type) for layer_type in (SLIDING, FULL))
    positions = hf.max_position_embeddings
    config = dense_config(
        sliding,
        architecture=NAME,
        dtype=dtype,
        max_model_len=min(max_model_len or positions, positions),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        moe=_moe(hf),
    )
    config = replace(config, other_ropes=(_rope_of_full(full),))
    tower = _tower(hf, dtype)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    del values["sees_ahead"]
    own = Gemma4Config(
        **values,
        logit_cap=hf.final_logit_softcapping,
        keys_are_values=bool(hf.attention_k_eq_v),
        full_num_kv_heads=full.num_key_value_heads,
        full_head_dim=full.head_dim,
        reader_width=2 if hf.use_double_wide_mlp else 1,
        input_size=hf.hidden_size_per_layer_input or 0,
        input_vocab=hf.vocab_size_per_layer_input,
        media_tokens=tuple(getattr(hf, one) for one in MEDIA_TOKENS if hasattr(hf, one)),
        pad_token=hf.pad_token_id or 0,
        sees_ahead=tower is not None and hf.use_bidirectional_attention == "vision",
    )
    sources = _sources(hf)
    return replace(
        dense.dense_model(config, layer_ropes=tuple(int(one == FULL) for one in hf.layer_types)),
        config=own,
        layer_kinds=_kinds(hf, own, sources),
        layer=gemma4_layer.layer,
        head=gemma3.head,
        outer_params=gemma4_layer.outer_params,
        layer_params=gemma4_layer.layer_params,
        layer_type=gemma4_layer.layer_type,
        kv_scales=None,
        read_elsewhere=(*ENCODERS, *_unused(sources)),
        # features of a tower replace embeddings that have their factor already
        embed_factor=gemma3.embed_factor(config) if tower is None else 1.0,
        tower=tower,
        layer_inputs=gemma4_layer.layer_inputs if own.input_size else None,
        extra_type=gemma4_layer.PerLayer if own.input_size else None,
    )


def _tower(hf: Any, dtype: torch.dtype) -> Tower | None:
    """The vision tower of a checkpoint that has one."""
    vision = getattr(hf, "vision_config", None)
    if vision is None:
        return None
    return registry.tower(SimpleNamespace(**{**vision, "out_hidden_size": hf.hidden_size}), dtype)


def _moe(hf: Any) -> MoeConfig | None:
    """The experts of every layer, if any. Raises ValueError for sizes that are missing."""
    if not hf.enable_moe_block:
        return None
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if getattr(hf, name) is None:
            raise ValueError(f"{name} is null: enable_moe_block needs a number")
    return MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.top_k_experts,
        expert_size=hf.moe_intermediate_size,
        normalize=True,
        activation="gelu",
    )


def _sources(hf: Any) -> tuple[int | None, ...]:
    """For each layer, that whose cache it reads: the last layers read those of the last one of
    their type before them. Raises ValueError if there is none."""
    types, num = hf.layer_types, hf.num_kv_shared_layers or 0
    if not 0 <= num < len(types):
        raise ValueError(
            f"num_kv_shared_layers is {num}: it must be at least 0 and below num_hidden_layers, "
            f"{len(types)}"
        )
    own = types[: len(types) - num]
    if missing := set(types) - set(own):
        raise ValueError(
            f"num_kv_shared_layers is {num}: no layer of type {sorted(missing)[0]!r} is left whose "
            "cache the others could read"
        )
    last = {one: idx for idx, one in enumerate(own)}
    return (*(None for _ in own), *(last[one] for one in types[len(own) :]))


def _kinds(hf: Any, cfg: Gemma4Config, sources: tuple[int | None, ...]) -> tuple[LayerKind, ...]:
    names = {SLIDING: "sliding", FULL: "full"}
    keeps = {SLIDING: dense.paged_kv(cfg, hf.sliding_window), FULL: dense.paged_kv(cfg.of_full)}
    return tuple(
        LayerKind(
            names[one] if source is None else f"{names[one]}_reader",
            replace(keeps[one], source=source),
            sparse=cfg.moe is not None,
        )
        for one, source in zip(hf.layer_types, sources, strict=True)
    )


def _unused(sources: tuple[int | None, ...]) -> list[str]:
    """Tensors of keys and values in layers that read the caches of others."""
    return [
        f"model.layers.{layer_idx}.self_attn.{name}"
        for layer_idx, source in enumerate(sources)
        for name in ("k_proj.", "v_proj.", "k_norm.", "v_norm.")
        if source is not None
    ]


def _refuse(hf: Any) -> None:
    """Raise ValueError for settings that no region computes."""
    if hf.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_activation {hf.hidden_activation!r} is not supported by {NAME}: only "
            "'gelu_pytorch_tanh' is"
        )
    if hf.use_bidirectional_attention not in (None, "vision"):  # "vision" is of images alone
        raise ValueError(
            f"use_bidirectional_attention {hf.use_bidirectional_attention!r} is not supported by "
            f"{NAME}: only null and 'vision' are"
        )
    size, vocab = hf.hidden_size_per_layer_input or 0, hf.vocab_size_per_layer_input
    if size < 0:
        raise ValueError(f"hidden_size_per_layer_input is {size}: it must be at least 0")
    if size and vocab < hf.vocab_size:
        raise ValueError(
            f"vocab_size_per_layer_input is {vocab}: it must be at least vocab_size, "
            f"{hf.vocab_size}"
        )
    if unknown := set(hf.layer_types) - {FULL, SLIDING}:
        raise ValueError(f"layer types {sorted(unknown)} are not supported by {NAME}")
    if hf.sliding_window is None or hf.sliding_window < 1:
        raise ValueError(f"sliding_window is {hf.sliding_window}: it must be at least 1")
    if hf.final_logit_softcapping is not None:
        check_factor("final_logit_softcapping", hf.final_logit_softcapping)
    if set(hf.rope_parameters) != {FULL, SLIDING}:
        raise ValueError(
            f"rope_parameters are of {sorted(hf.rope_parameters)}: they must be of "
            f"{[FULL, SLIDING]}"
        )


def _of_type(hf: Any, layer_type: str) -> Any:
    """The config of a model whose layers are all like those of one type.

    Without a layer of the type it is that of the others. Raises ValueError if the layers of the
    type differ.
    """
    layers = [idx for idx, one in enumerate(hf.layer_types) if one == layer_type]
    flat = copy.copy(hf.per_layer_config[layers[0] if layers else 0])
    for idx in layers:
        other = hf.per_layer_config[idx]
        for name in ("head_dim", "num_key_value_heads", "intermediate_size"):
            if getattr(other, name) != getattr(flat, name):
                raise ValueError(
                    f"per_layer_config gives layer {idx} {name} {getattr(other, name)}, and layer "
                    f"{layers[0]} {getattr(flat, name)}: layers of one type must have the same"
                )
    flat.rope_parameters = dict(hf.rope_parameters[layer_type])
    return flat


def _rope_of_full(full: Any) -> Rope:
    """The rotary table of full layers: the first frequencies of a whole head, the others 0."""
    parameters, size = full.rope_parameters, full.head_dim
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise ValueError(
            f"rope type {rope_type!r} of {FULL} is not supported by {NAME}: use 'proportional'"
        )
    theta = parameters.get("rope_theta")
    part, factor = (parameters.get(key, 1.0) for key in ("partial_rotary_factor", "factor"))
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", part), ("factor", factor)):
        check_factor(key, value)
    num = size // 2 if rope_type == "default" else int(part * size // 2)
    if num > size // 2:
        raise ValueError(f"partial_rotary_factor is {part}: it must be at most 1")
    exponent = torch.arange(0, 2 * num, 2, dtype=torch.int64).float() / size
    rotated = 1.0 / theta**exponent / (1.0 if rope_type == "default" else factor)
    return Rope((*rotated.tolist(), *[0.0] * (size // 2 - num)))
