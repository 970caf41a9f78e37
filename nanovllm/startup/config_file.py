"""Reads a checkpoint's JSON files, and makes transformers' config from config.json."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanovllm.models import modelopt_config, registry
from nanovllm.models.gguf import config as gguf_config
from nanovllm.models.gguf.header import is_gguf, read
from nanovllm.models.layer_ropes import FULL, SLIDING
from nanovllm.models.quant_config import MODELOPT_FILE
from nanovllm.models.rope import refuse_nested

# transformers reads these names too, although they are not fields of a config class.
OTHER_NAMES = frozenset(
    {"classifier_from_token", "head_dim", "is_causal", "is_original_qwen3_reranker",
     "original_max_position_embeddings", "partial_rotary_factor",
     "quantization_config", "rope_scaling", "rope_theta", "torch_dtype"}
)  # fmt: skip
# Fields of a whole model's config that apply to its text model too.
OF_ALL = (
    "architectures", "tie_word_embeddings", "dtype", "quantization_config", "image_token_id",
    "video_token_id", "vision_start_token_id", "vision_end_token_id", "audio_token_id",
    "position_id_per_seconds", "mm_tokens_per_image", "classifier_from_token",
)  # fmt: skip
# Where configs have rope parameters. The last three are the base frequencies of one type of layers.
ROPE_FIELDS = (
    "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor",
    "original_max_position_embeddings", "global_rope_theta", "local_rope_theta",
    "rope_local_base_freq",
)  # fmt: skip
THETAS = {
    "global_rope_theta": FULL, "local_rope_theta": SLIDING, "rope_local_base_freq": SLIDING,
}  # fmt: skip
# The largest values of config fields, so that a damaged or hostile file cannot cause huge lists or
# tables. Real models are far below.
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1 << 12),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 1 << 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1 << 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 1 << 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 1 << 16),
    **dict.fromkeys(("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel"), 1 << 10),
    **dict.fromkeys(("mamba_n_heads", "mamba_n_groups", "mamba_num_heads", "n_groups"), 1 << 16),
    **dict.fromkeys(("mamba_d_ssm", "mamba_d_state", "mamba_head_dim"), 1 << 20),
    **dict.fromkeys(("hidden_size", "head_dim", "d_model", "out_hidden_size"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "vocab_size"), 1 << 24),
    "shared_expert_intermediate_size": 1 << 24,
    **dict.fromkeys(("n_shared_experts", "num_nextn_predict_layers"), 1 << 12),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 1 << 20),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 1 << 20),
}
LARGEST_OTHER = (1 << 63) - 1
FLOATS = ("Infinity", "-Infinity", "NaN")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, with the file's name."""
    try:
        found = json.loads(path.read_bytes(), object_hook=_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {reprlib.repr(found)}: it must be an object")
    return found


def _float(found: dict[str, Any]) -> Any:
    """An object of JSON, or the number that transformers writes in this form: an infinite one."""
    text = found.get("__float__")
    return float(text) if found.keys() == {"__float__"} and text in FLOATS else found


def read_stored(path: Path) -> dict[str, Any]:
    """The fields of a config.json, its folder's, or a GGUF file's. Raises ValueError.

    A file of ModelOpt beside it may have its `quantization_config`.
    """
    if is_gguf(path):
        return gguf_config.fields(read(path))
    path = path / "config.json" if path.is_dir() else path
    found, of_modelopt = read_object(path), path.with_name(MODELOPT_FILE)
    if found.get("quantization_config") is None and of_modelopt.is_file():
        found["quantization_config"] = modelopt_config.of_file(read_object(of_modelopt))
    return found


def transformers_config(path: Path, overrides: Mapping[str, object]) -> Any:
    """transformers' config of a config.json or a GGUF file, in which `overrides` replace fields.

    Raises ValueError, with the file's name, for an unknown architecture or model type, for rope
    parameters per layer type, for values that transformers refuses, and for overrides of unknown
    fields.
    """
    stored = read_stored(path)
    fields = overridden(stored, overrides) if overrides else stored
    names, model_type = fields.get("architectures"), fields.get("model_type")
    if not isinstance(names, list):
        raise ValueError(f"{path}: architectures is {names!r}: it must be a list of names")
    ropes = _ropes_by_layer_type(overrides) if _has_ropes_per_layer_type(fields) else {}
    try:
        check_sizes({**fields, "rope overrides": ropes})
        registry.check(names)
        if not registry.ROPES_PER_LAYER_TYPE.intersection(names):
            _refuse_nested_ropes(fields)
    except ValueError as error:
        own = "; its own code (auto_map) is not run" if "auto_map" in fields else ""
        raise ValueError(f"{path}: {error}{own}") from error
    from transformers import CONFIG_MAPPING

    if isinstance(model_type, str) and model_type in registry.READ_AS:
        model_type, defaults = registry.READ_AS[model_type]
        fields = {**defaults, **fields, "model_type": model_type}
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type is {model_type!r}, which transformers does not support"
        )
    try:
        with _without_docstrings():  # looking up the class imports its module
            hf = _made(CONFIG_MAPPING[model_type], fields, ropes)
    except Exception as error:  # of several libraries, some with more than one line
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: transformers refuses the config: {reason}") from error
    known = {field.name for field in dataclasses.fields(hf)} | set(stored) | OTHER_NAMES
    if unknown := sorted(set(overrides) - known):
        raise ValueError(
            f"hf_overrides has {unknown[0]!r}, which is not a field of {type(hf).__name__}: "
            f"use one of {', '.join(sorted(known))}"
        )
    # checkpoints with speech output have the text model's part as `thinker_config`
    part = getattr(hf, "thinker_config", hf)
    return _of_text(hf, part) if hasattr(part, "text_config") else hf


def _made(kind: Any, fields: Mapping[str, Any], ropes: Mapping[str, Any]) -> Any:
    """transformers' config of a class. `ropes` are merged into the sets per layer type that it
    makes, also of flat fields."""
    hf = kind.from_dict(dict(fields))
    if not ropes:
        return hf
    others = {name: one for name, one in fields.items() if name not in ROPE_FIELDS}
    return kind.from_dict({**others, "rope_parameters": _merged(hf.rope_parameters, ropes)})


def llama_config(fields: Mapping[str, Any]) -> Any:
    """transformers' config of a Llama with these fields. Raises ValueError for what it refuses."""
    from transformers import LlamaConfig

    _refuse_nested_ropes(fields)
    try:
        with _without_docstrings():
            return LlamaConfig.from_dict(dict(fields))
    except Exception as error:  # of several libraries, some with more than one line
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"transformers refuses the config: {reason}") from error


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a number, also in nested objects, that no model can have."""
    for name, value in fields.items():
        if isinstance(value, dict):
            check_sizes(value)
        largest = LARGEST.get(name, LARGEST_OTHER if isinstance(value, int) else math.inf)
        if isinstance(value, (int, float)) and value > largest:
            raise ValueError(f"{name} is {value}: it must be at most {largest}")


def _of_text(whole: Any, part: Any) -> Any:
    """The config of the text model of a checkpoint with towers. It gets the common fields of the
    configs of the whole model and of the part with the towers, and the towers' fields as
    `vision_config` and `audio_config`."""

    def first(name: str, *configs: Any) -> Any:
        found = (getattr(config, name, None) for config in configs)
        return next((value for value in found if value is not None), None)

    text = part.text_config
    for name in OF_ALL:
        value = first(name, whole, part)
        if value is not None:
            setattr(text, name, value)
    for name in ("eos_token_id", "bos_token_id"):
        setattr(text, name, first(name, whole, part, text))
    for name in ("vision_config", "audio_config"):
        tower = getattr(part, name, None)
        if tower is not None:
            setattr(text, name, tower.to_dict())
    return text


def _refuse_nested_ropes(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for rope parameters per layer type: some versions of transformers fail on
    them, where the architecture has none."""
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(name), dict):
            refuse_nested(fields[name])


def overridden(fields: Mapping[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    """The fields of config.json after `overrides`, which replace values, and merge into dicts.

    Both may use the older names of rope parameters and of dtype. The result has the newer ones. For
    models with rope parameters per layer type these stay as they are: `transformers_config`
    overrides those of transformers' config.
    """
    changes = json.loads(json.dumps(dict(overrides)))
    kept = {**fields, **changes}
    if _has_ropes_per_layer_type(kept):
        changes = {name: one for name, one in changes.items() if name not in ROPE_FIELDS}
        return _merged(_renamed_dtype(fields), _renamed_dtype(changes))
    return _merged(_renamed(fields), _renamed(changes))


def _has_ropes_per_layer_type(fields: Mapping[str, Any]) -> bool:
    """Whether a set for each layer type is among these fields, not those of `text_config`."""
    names = fields.get("architectures")
    if not isinstance(names, list) or "text_config" in fields:
        return False
    return any(isinstance(one, str) and one in registry.ROPES_PER_LAYER_TYPE for one in names)


def _ropes_by_layer_type(overrides: Mapping[str, object]) -> dict[str, Any]:
    """What overrides change for each layer type. Flat values are those of full layers, as
    in configs of Gemma-3 and OLMo-3, unless their names say another."""
    changes = {name: one for name, one in overrides.items() if name in ROPE_FIELDS}
    thetas = {kind: changes.pop(name) for name, kind in THETAS.items() if name in changes}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(changes.get(name) or {}, dict):
            raise ValueError(f"hf_overrides has {name} {changes[name]!r:.80}: it must be a dict")
    rope = _renamed(json.loads(json.dumps(changes))).get("rope_parameters", {})
    nested = {kind: _renamed_type(one) for kind, one in rope.items() if isinstance(one, dict)}
    flat = {name: one for name, one in rope.items() if name not in nested}
    found = {FULL: flat} if flat else {}
    found = _merged(found, {kind: {"rope_theta": theta} for kind, theta in thetas.items()})
    return _merged(found, nested)


def _merged(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(fields)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if both else value
    return result


def _renamed_dtype(fields: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(fields)
    old_dtype = result.pop("torch_dtype", None)
    if old_dtype is not None and result.get("dtype") is None:
        result["dtype"] = old_dtype
    return result


def _renamed_type(rope: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(rope)
    if "type" in result:
        result.setdefault("rope_type", result.pop("type"))
    return result


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with one name for each meaning, so that an override replaces the right field."""
    result = _renamed_dtype(fields)
    names = [name for name in ("rope_scaling", "rope_parameters") if name in result]
    found = [result.pop(name) for name in names]
    rope: Any = next((value for value in found if value), {})  # the order of transformers
    if not isinstance(rope, dict):
        return {**result, names[found.index(rope)]: rope}  # transformers will refuse it
    rope = dict(rope)
    if names and not rope:
        rope["rope_type"] = "default"
    rope = _renamed_type(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in result:
            rope.setdefault(name, result.pop(name))
    if "original_max_position_embeddings" in result:  # transformers prefers it to the inner one
        name = "original_max_position_embeddings"
        rope[name] = result.pop(name)
    return {**result, "rope_parameters": rope} if rope else result


@contextlib.contextmanager
def _without_docstrings() -> Iterator[None]:
    """Keep transformers from writing docstrings of config classes.

    Up to 5.20 it imports its generation code for them, with scipy, pandas and Dynamo: 2.3 s.
    """
    module = sys.modules.get("transformers.utils.auto_docstring")
    write = getattr(module, "auto_class_docstring", None)
    if module is None or write is None:
        yield
        return
    module.auto_class_docstring = lambda cls, **_: cls  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.auto_class_docstring = write  # type: ignore[attr-defined]
