"""Reads the config.json of a head (`models.draft_head`), in the layouts in which it is published.

A head's architecture is not one of transformers'. Its config has the fields of a Llama, at the top
or, in the layout of `speculators`, as `transformer_layer_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.models.checkpoint import Checkpoint
from nanovllm.startup.config_file import check_sizes, llama_config, read_object

NESTED, AUX = "transformer_layer_config", "eagle_aux_hidden_state_layer_ids"
LLAMA_TYPES = ("llama", "qwen3")  # of a layer that is a Llama's, perhaps with norms of q and k
FLAGS = {  # the default at the top, and in the nested layout
    "norm_before_residual": (False, True),
    "norm_before_fc": (False, False),
    "fc_norm": (False, False),
    "norm_output": (False, False),
}  # fmt: skip
# What DSpark adds to DFlash in the layout of `speculators`, with the defaults of both.
DSPARK = {"sample_from_anchor": (False, True), "markov_rank": (0, 256)}
# Fields of other drafts, with the value that changes nothing.
OTHER_DFLASH = {
    "quantization_config": None, "use_sliding_window": None, "is_causal": False,
    "conv_kernel_size": None, "selector_rank": None, "markov_rank": None,
    "sample_from_anchor": None, "shift_label": None, "projector_type": "dflash",
    "input_embedding_scale": 1.0, "output_multiplier": 1.0,
    "final_logit_softcapping": 0.0,
}  # fmt: skip
MAX_STATES = 32


def eagle3_config(folder: Path) -> Any:
    """transformers' config of an EAGLE-3 head's layer, with what `models.eagle3` reads beside it.

    Raises ValueError, with the file's name, for fields of another kind of head.
    """
    path = folder / "config.json"
    stored = read_object(path)
    try:
        check_sizes(stored)
        return _eagle3(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tensor_names(folder: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors; none without weights."""
    if not any(folder.glob("*.safetensors")):
        return frozenset()
    with Checkpoint(folder) as checkpoint:
        return frozenset(checkpoint)


def _eagle3(stored: dict[str, Any]) -> Any:
    nested = stored.get(NESTED)
    is_nested = nested is not None
    layer = nested if is_nested else stored
    if not isinstance(layer, dict):
        raise ValueError(f"{NESTED} is {layer!r}: it must be an object")
    _refuse(stored, layer, is_nested=is_nested)
    hf = llama_config({**layer, "model_type": "llama"})
    for name, defaults in FLAGS.items():
        value = stored.get(name)
        value = defaults[is_nested] if value is None else value
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: it must be true or false")
        setattr(hf, name, value)
    hf.draft_vocab_size = _size(stored, "draft_vocab_size", hf.vocab_size)
    hf.state_size = _size(stored, "target_hidden_size", hf.hidden_size)
    if hf.draft_vocab_size > hf.vocab_size:
        raise ValueError(
            f"draft_vocab_size is {hf.draft_vocab_size}: it must be at most vocab_size, "
            f"{hf.vocab_size}"
        )
    hf.read_layers = _read_layers(stored)
    return hf


def dflash_config(folder: Path) -> Any:
    """transformers' config of a DFlash draft's layers, with what `models.dflash` reads beside it.

    Raises ValueError, with the file's name, for fields of another kind of draft.
    """
    path = folder / "config.json"
    stored = read_object(path)
    try:
        check_sizes(stored)
        return _dflash(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _dflash(stored: dict[str, Any]) -> Any:
    is_nested, kind = NESTED in stored, stored.get("speculators_model_type")
    stored, inner = _of_speculators(stored) if is_nested else _of_dflash(stored)
    both = {**stored, **inner}
    if both.get("model_type") != "qwen3":
        raise ValueError(
            f"model_type {both.get('model_type')!r} of a DFlash draft is not supported: only "
            "'qwen3' is"
        )
    for name in OTHER_DFLASH:
        if name in DSPARK and is_nested:
            continue
        if both.get(name) not in (None, False, OTHER_DFLASH[name]):
            raise ValueError(f"{name} of a DFlash draft is {both[name]!r}: it is not supported")
    types = both.get("layer_types")
    if types is not None and set(types) != {"full_attention"}:
        raise ValueError(f"layer_types of a DFlash draft are {types}: all must be full_attention")
    hf = llama_config({**stored, "model_type": "llama"})
    hf.attention_bias = bool(stored.get("attention_bias", False))
    hf.block_size = _size(both, "block_size", 16)
    ids, mask_id = both.get("target_layer_ids"), both.get("mask_token_id")
    if not isinstance(ids, list) or not 0 < len(ids) <= MAX_STATES or not all(map(_is_id, ids)):
        raise ValueError(
            f"target_layer_ids is {ids!r}: it must be up to {MAX_STATES} layers, from 0 on"
        )
    if not _is_id(mask_id) or mask_id >= hf.vocab_size:
        raise ValueError(f"mask_token_id is {mask_id!r}: it must be below {hf.vocab_size}")
    hf.read_layers, hf.mask_token_id = tuple(ids), mask_id
    hf.draft_vocab_size = min(_size(both, "draft_vocab_size", hf.vocab_size), hf.vocab_size)
    hf.sample_from_anchor, hf.markov_rank = _dspark(both if is_nested else {}, kind == "dspark")
    return hf


def _dspark(both: dict[str, Any], is_dspark: bool) -> tuple[bool, int]:
    """The fields of `DSPARK`."""
    anchor, rank = (
        default[is_dspark] if both.get(name) is None else both[name]
        for name, default in DSPARK.items()
    )
    if not isinstance(anchor, bool):
        raise ValueError(f"sample_from_anchor is {anchor!r}: it must be true or false")
    if not _is_id(rank):
        raise ValueError(f"markov_rank is {rank!r}: it must be at least 0")
    kind = both.get("markov_head_type", "vanilla")
    if rank and kind != "vanilla":
        raise ValueError(f"markov_head_type {kind!r} is not supported: only 'vanilla' is")
    return anchor, int(rank)


def _of_dflash(stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the layers, and what the draft has beside them."""
    inner = stored.get("dflash_config")
    if not isinstance(inner, dict):
        raise ValueError(f"dflash_config is {inner!r}: it must be an object")
    return stored, inner


def _of_speculators(stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same in the layout of `speculators`, which names the layers before which states are read
    (the number of layers: after the last one)."""
    layer, kind = stored[NESTED], stored.get("speculators_model_type")
    if kind not in ("dflash", "dspark") or not isinstance(layer, dict):
        raise ValueError(
            f"speculators_model_type {kind!r} is not supported for a DFlash draft, or {NESTED} is "
            "no object: only 'dflash' and 'dspark' are"
        )
    name = "aux_hidden_state_layer_ids"
    ids = stored.get(name)
    if not isinstance(ids, list) or not all(_is_id(one) and one for one in ids):
        raise ValueError(f"{name} is {ids!r}: it must be layers, from 1 on")
    inner = {key: value for key, value in stored.items() if key not in (NESTED, "model_type")}
    return layer, {**inner, "target_layer_ids": [one - 1 for one in ids]}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _size(stored: dict[str, Any], name: str, default: int) -> int:
    value = stored.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be at least 1")
    return value


def _read_layers(stored: dict[str, Any]) -> tuple[int, ...] | None:
    """The layers after which the states are read, from 0; None for the default.

    SGLang's field, within `eagle_config`, names these layers. That of `speculators` and vLLM, at
    the top, names the layers before which they are read.
    """
    inner = stored.get("eagle_config")
    if inner is not None and not isinstance(inner, dict):
        raise ValueError(f"eagle_config is {inner!r}: it must be an object")
    if inner is not None and inner.get("use_aux_hidden_state") is False:
        raise ValueError("use_aux_hidden_state false is not supported: it is not an EAGLE-3 head")
    of_top, of_inner = stored.get(AUX), (inner or {}).get(AUX)
    ids = of_top if of_top is not None else of_inner
    if ids is None:
        return None
    first = 1 if of_top is not None else 0
    if (
        not isinstance(ids, list)
        or len(ids) != 3
        or not all(isinstance(one, int) and one >= first for one in ids)
    ):
        raise ValueError(f"{AUX} is {ids!r}: it must be three layers, from {first} on")
    return tuple(one - first for one in ids)


def _refuse(stored: dict[str, Any], layer: dict[str, Any], *, is_nested: bool) -> None:
    """Raise ValueError for other heads, and for settings that no region computes."""
    kind = stored.get("speculators_model_type", "eagle3")
    if is_nested and kind != "eagle3":
        raise ValueError(f"speculators_model_type {kind!r} is not supported: only 'eagle3' is")
    if layer.get("model_type", "llama") not in LLAMA_TYPES:
        raise ValueError(
            f"model_type {layer['model_type']!r} of an EAGLE-3 head is not supported: only "
            f"{' and '.join(map(repr, LLAMA_TYPES))} are"
        )
    for name in ("quantization_config", "sliding_window", "use_sliding_window", "bias"):
        if stored.get(name) or layer.get(name):
            raise ValueError(f"{name} of an EAGLE-3 head is not supported: leave it out")
