"""An adapter's adapter_config.json, as PEFT 0.21 writes it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR, HEAD = "all-linear", "lm_head"
MAX_CONFIG_BYTES = 1 << 20

# Fields that say how an adapter was trained, or by what.
UNREAD = frozenset({
    "auto_mapping", "corda_config", "ephemeral_gpu_offload",
    "eva_config", "fan_in_fan_out", "inference_mode", "lora_dropout", "lora_ga_config",
    "loftq_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
})  # fmt: skip
READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "peft_type", "r",
    "rank_pattern", "target_modules", "target_parameters", "use_rslora",
})  # fmt: skip
# Fields that change the mathematics, and what they stand for.
REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole copies of modules",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained embeddings of tokens",
    "layer_replication": "repeated layers",
    "lora_bias": "a bias of B",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
}
# Which biases of the base were trained. If it has some, the file has them.
BIASES = ("none", "all", "lora_only")
# Values of `init_lora_weights` with which PEFT changes the base model as it loads an adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterError(ValueError):
    """An adapter's files are damaged, not supported, or do not fit the model."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that count: see PEFT's `LoraConfig`.

    Names of modules are those of transformers, such as "model.layers.0.self_attn.q_proj".
    """

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers_to_transform: Sequence[int] | None
    layers_pattern: Sequence[str]
    target_parameters: Sequence[str] = ()
    bias: str = "none"
    ties_head: bool = False  # to the table: PEFT takes the head from the target modules then
    base: str = ""  # the name or path of the model that it was trained for, if given

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """The config in a folder. Raises AdapterError, naming the field that is not supported."""
        found = _fields(folder / CONFIG)
        _refuse(found)
        layers = found.get("layers_to_transform")
        return cls(
            rank=_whole(found, "r"),
            alpha=_number("lora_alpha", found.get("lora_alpha")),
            use_rslora=bool(found.get("use_rslora")),
            target_modules=_names(found, "target_modules"),
            exclude_modules=_names(found, "exclude_modules"),
            rank_pattern=_pattern(found, "rank_pattern"),
            alpha_pattern=_pattern(found, "alpha_pattern"),
            layers_to_transform=[layers] if isinstance(layers, int) else layers or None,
            layers_pattern=_as_list(_names(found, "layers_pattern")),
            target_parameters=_as_list(_names(found, "target_parameters")),
            bias=found.get("bias", "none"),
            ties_head=bool(found.get("ensure_weight_tying")),
            base=str(found.get("base_model_name_or_path") or ""),
        )

    @classmethod
    def checked(cls, folder: Path, max_rank: int) -> PeftConfig:
        """The config in a folder that also has weights, for slots of `max_rank`. This is all that
        can be checked without a model. Raises AdapterError."""
        found = cls.read(folder)
        if found.max_rank > max_rank:
            raise AdapterError(
                f"{folder / CONFIG} has rank {found.max_rank}, but max_lora_rank is {max_rank}"
            )
        if not (folder / WEIGHTS).is_file():
            raise AdapterError(f"{folder / WEIGHTS} cannot be read: there is no such file")
        return found

    @property
    def max_rank(self) -> int:
        return max((self.rank, *self.rank_pattern.values()))

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B · A: alpha / r, or alpha / √r with rank-stabilised LoRA
        (arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether the adapter has matrices for a module, by the rules of PEFT's
        `check_target_module_exists`. With "all-linear" every linear layer has some."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if self.target_modules == ALL_LINEAR or (self.ties_head and _matches([HEAD], module)):
            return True
        if not _matches(self.target_modules, module):
            return False
        return isinstance(self.target_modules, str) or self._has_layer(module)

    def targets_parameter(self, name: str) -> bool:
        """Whether the adapter has matrices for a parameter, by PEFT's rules for parameters."""
        return _matches(self.target_parameters, name)

    def _has_layer(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        found = (re.match(rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\.", module) for one in patterns)
        match = next(filter(None, found), None)
        return match is not None and int(match["idx"]) in self.layers_to_transform


def _fields(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    return found


def _refuse(found: Mapping[str, Any]) -> None:
    """Raises AdapterError for what is not supported."""
    if found.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {found.get('peft_type')!r}: only 'LORA' is supported")
    for name, what in REFUSED.items():
        if found.get(name):
            raise AdapterError(f"{name} is {found[name]!r}: {what} is not supported")
    if found.get("bias", "none") not in BIASES:
        raise AdapterError(f"bias is {found['bias']!r}: it must be one of {', '.join(BIASES)}")
    made = found.get("init_lora_weights")
    if isinstance(made, str) and made.startswith(CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights is {made!r}, which changes the base model: convert the adapter "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    unknown = sorted(name for name in found.keys() - UNREAD - READ - REFUSED.keys() if found[name])
    if unknown:
        shown = ", ".join(f"{name}={found[name]!r}" for name in unknown)
        raise AdapterError(f"{CONFIG} has {shown}, which is not supported")


def _whole(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if type(value) is not int or value < 1:
        raise AdapterError(f"{name} is {value!r}: it must be a whole number of at least 1")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{name} is {value!r}: it must be a number")
    return value


def _names(found: Mapping[str, Any], name: str) -> str | Sequence[str]:
    value = found.get(name) or ()
    is_list = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    if not (is_list or isinstance(value, str)):
        raise AdapterError(f"{name} is {value!r}: it must be a text, or a list of texts")
    if isinstance(value, str):
        _compiled(name, value)
    return value


def _pattern(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is {value!r}: it must be an object")
    for key in value:
        _compiled(name, key)
        _whole(value, key) if name == "rank_pattern" else _number(f"{name}[{key!r}]", value[key])
    return value


def _compiled(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{name} has {pattern!r}: {error}") from error


def _as_list(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _matches(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _key(patterns: Iterable[str], module: str) -> str:
    """The first of the patterns that the end of a module's name matches."""
    found = (one for one in patterns if re.match(rf"(.*\.)?({one})$", module))
    return next(found, module)
