"""From the `quantization_config` of the library compressed-tensors to a scheme.

Its groups name modules, by "Linear" (all linear layers), names or regular expressions, and say how
their weights are stored. Inputs of products and outputs are not quantized.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.models.checkpoint import plain_name, spellings
from nanovllm.models.formats.compressed import CHANNEL, TENSOR, Int8s, PackedIntegers
from nanovllm.models.formats.format import Format
from nanovllm.models.formats.fp4 import MX_GROUP, NV_GROUP, MxFp4, NvFp4
from nanovllm.models.formats.fp8 import Fp8
from nanovllm.models.formats.plain import PLAIN
from nanovllm.models.param import Param
from nanovllm.models.quant_config import Config, block, require
from nanovllm.models.schemes import HEAD, REGEX, BySource, Modules

logger = logging.getLogger(__name__)
LINEAR = "Linear"
CLASS = re.compile(r"[A-Z]\w*")  # the name of a class of modules, not of a module


@dataclass(frozen=True)
class Group:
    """The modules that `targets` names, and how they are stored."""

    targets: tuple[str, ...]
    stored: Format

    def names(self, module: str) -> bool:
        """Whether a target other than "Linear" names the module."""
        return any(
            any(re.match(one.removeprefix(REGEX), name) for name in spellings(module))
            if one.startswith(REGEX)
            else plain_name(one) == module
            for one in self.targets
        )


@dataclass(frozen=True)
class Grouped(BySource):
    """Modules in the format of the group that names them, else of the one of all linear layers."""

    groups: tuple[Group, ...]
    ignored: Modules

    def __str__(self) -> str:
        return "quant_method 'compressed-tensors'"

    def format(self, param: Param, source: str) -> Format:
        if param.is_vocab and source != HEAD:  # a tied head is the table
            return PLAIN
        module = source.removesuffix(".weight")
        others = () if param.other_name is None else (param.other_name.removesuffix(".weight"),)
        if module in self.ignored or any(one in self.ignored for one in others):
            return PLAIN
        named = (group.stored for group in self.groups if group.names(module))
        of_class = (group.stored for group in self.groups if LINEAR in group.targets)
        return next(named, next(of_class, PLAIN))


def scheme(config: Config) -> Grouped:
    # older versions wrote "frozen" for the same files
    require(config, "quantization_status", "compressed", "frozen")
    if sparsity := config.get("sparsity_config"):
        require(sparsity, "format", "dense")
    require(config, "transform_config", None, {})
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"quantization_config has the groups {groups!r}: there must be one")
    found = tuple(_group(config, group) for group in groups.values())
    _cache(config.get("kv_cache_scheme"))
    return Grouped(found, Modules(config.get("ignore") or ()))


def _group(config: Config, group: Any) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ValueError(f"quantization_config has the group {group!r}: it must have weights")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise ValueError(f"quantization_config has targets {targets!r}: they must be names")
    for one in targets:
        if CLASS.fullmatch(one) and one != LINEAR:
            raise ValueError(
                f"quantization_config has the target {one!r}, which is not supported: only "
                f"{LINEAR!r}, names of modules and regular expressions"
            )
    Modules(targets)  # refuses invalid regular expressions
    stored_as = group.get("format") or config.get("format")
    require({"format": stored_as}, "format", *FORMATS)
    if group.get("input_activations"):
        logger.info("inputs of products are not quantized, unlike the checkpoint's config asks for")
    require(group, "output_activations", None)
    return Group(tuple(targets), FORMATS[str(stored_as)](group["weights"]))


def _integers(weights: Config, *, is_packed: bool) -> Format:
    require(weights, "type", "int")
    require(weights, "num_bits", 4, 8) if is_packed else require(weights, "num_bits", 8)
    require(weights, "symmetric", True, False)
    strategy, actorder = _strategy(weights), weights.get("actorder")
    require({"strategy": strategy}, "strategy", "tensor", "channel", "group")
    require(weights, "actorder", None, False, "weight", "static", "group", "dynamic")
    inputs = {"tensor": TENSOR, "channel": CHANNEL}.get(strategy)
    if inputs is None:
        inputs = weights.get("group_size")
        if not isinstance(inputs, int) or inputs <= 0:
            raise ValueError(
                f"quantization_config has group_size {inputs!r}: it must be a number above 0"
            )
    is_symmetric, has_order = (
        weights.get("symmetric") is not False,
        actorder in ("group", "dynamic"),
    )
    has_order = has_order and inputs > 0
    if is_packed and not is_symmetric and inputs == TENSOR:
        raise ValueError(
            "quantization_config has strategy 'tensor' and symmetric False, which is not supported "
            "for 'pack-quantized'"
        )
    kind = PackedIntegers if is_packed else Int8s
    return kind(weights["num_bits"], inputs, is_symmetric, has_order)


def _floats(weights: Config) -> Format:
    require(weights, "type", "float")
    require(weights, "num_bits", 8)
    require(weights, "symmetric", True)
    strategy = _strategy(weights)
    require({"strategy": strategy}, "strategy", "tensor", "channel", "block")
    blocks = {"tensor": (0, 0), "channel": (1, 0)}
    return Fp8(blocks.get(strategy) or block(weights.get("block_structure")), "weight_scale")


def _naive(weights: Config) -> Format:
    if weights.get("type") == "float":
        return _floats(weights)
    return _integers(weights, is_packed=False)


def _fp4(weights: Config, stored: Format, group: int) -> Format:
    require(weights, "type", "float")
    require(weights, "num_bits", 4)
    require(weights, "symmetric", True)
    require(weights, "group_size", group)
    return stored


FORMATS: dict[str, Callable[[Config], Format]] = {
    "pack-quantized": lambda weights: _integers(weights, is_packed=True),
    "int-quantized": lambda weights: _integers(weights, is_packed=False),
    "float-quantized": _floats,
    "naive-quantized": _naive,
    "nvfp4-pack-quantized": lambda weights: _fp4(weights, NvFp4(), NV_GROUP),
    "mxfp4-pack-quantized": lambda weights: _fp4(weights, MxFp4(), MX_GROUP),
}


def _strategy(weights: Config) -> str:
    """The strategy, which follows from the group's size if it is not there."""
    if (found := weights.get("strategy")) is not None:
        return str(found)
    size = weights.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _cache(scheme: Any) -> None:
    """A cache of 8-bit floats is the checkpoint's advice, not a need: its scales are not read."""
    if scheme is None:
        return
    if not isinstance(scheme, Mapping) or (scheme.get("num_bits"), scheme.get("type")) != (
        8, "float",
    ):  # fmt: skip
        raise ValueError(
            f"quantization_config has kv_cache_scheme {scheme!r}, which is not supported: only "
            "None, and num_bits 8 with type 'float'"
        )
    logger.info("the checkpoint was made for an 8-bit cache: kv_cache_dtype='fp8' gives one")
