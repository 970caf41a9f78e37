"""Chooses the format of each parameter, by the option `quantization` or the checkpoint.

A scheme chooses formats for linear layers and experts. All other parameters are plain tensors.
To read checkpoints of another `quant_method`, add a function to `CHECKPOINTS` that makes a scheme
from the checkpoint's `quantization_config`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from nanovllm.models.checkpoint import plain_name
from nanovllm.models.formats.format import Format
from nanovllm.models.formats.int8 import Int8
from nanovllm.models.formats.plain import PLAIN
from nanovllm.models.param import Param

HEAD = ("lm_head.weight",)
REGEX = "re:"  # before a regular expression, as compressed-tensors has it


class Scheme(ABC):
    """Chooses a format for each parameter. Schemes are frozen dataclasses; `str` names one in
    messages."""

    @abstractmethod
    def format(self, param: Param) -> Format:
        """The format of a parameter. Raises ValueError if its sources have different ones."""


@dataclass(frozen=True)
class Converted(Scheme):
    """All linear layers are converted to one format as they are read. A tied head is converted,
    and the embedding table stays plain, since its rows are looked up."""

    linear: Format = PLAIN

    def __str__(self) -> str:
        return f"quantization {self.linear.name!r}"

    def format(self, param: Param) -> Format:
        return self.linear if param.kind == "linear" else PLAIN


UNQUANTIZED = Converted()


class Modules:
    """The modules of a checkpoint that its config names: by their names, by the beginning, middle
    or end of these in whole parts ("lm_head", "model.layers.0", "mlp.gate"), or after "re:" by a
    regular expression. Raises ValueError for an invalid regular expression."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self._parts = frozenset(map(plain_name, self.patterns))
        self._known: dict[str, bool] = {}
        expressions = [one.removeprefix(REGEX) for one in self.patterns if one.startswith(REGEX)]
        try:
            self._expressions = tuple(map(re.compile, expressions))
        except re.error as error:
            raise ValueError(f"quantization_config names modules by {expressions}: {error}") from (
                error
            )

    def __contains__(self, module: str) -> bool:
        if module not in self._known:
            self._known[module] = self._has(module)
        return self._known[module]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Modules) and self.patterns == other.patterns

    def __hash__(self) -> int:
        return hash(self.patterns)

    def __repr__(self) -> str:
        return f"Modules({self.patterns})"

    def _has(self, module: str) -> bool:
        names = module.split(".")
        bounds = combinations(range(len(names) + 1), 2)
        return any(".".join(names[i:j]) in self._parts for i, j in bounds) or any(
            expression.match(module) for expression in self._expressions
        )


@dataclass(frozen=True)
class Packed(Scheme):
    """A checkpoint that stores linear layers and experts in one format.

    The `plain` modules are not among them, and the head is only if it `has_head`.
    """

    quant_method: str
    stored: Format
    plain: Modules = field(default_factory=Modules)
    has_head: bool = False

    def __str__(self) -> str:
        return f"quant_method {self.quant_method!r}"

    def format(self, param: Param) -> Format:
        is_packed = param.kind in ("linear", "experts") and not param.compressed
        if not is_packed or (param.is_vocab and not (self.has_head and param.sources == HEAD)):
            return PLAIN
        if param.other_name is not None and _module(param.other_name) in self.plain:
            return PLAIN
        found = {_module(source) in self.plain: source for source in param.sources}
        if len(found) > 1:
            raise ValueError(
                f"quantization_config leaves {found[True]} as it is and not {found[False]}: they "
                "are parts of one matrix here, which has one format"
            )
        return PLAIN if True in found else self.stored


# The values of the option `quantization`, and the values of `quant_method` in checkpoints.
OPTIONS: dict[str, Scheme] = {"int8": Converted(Int8())}
CHECKPOINTS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {}


def of_checkpoint(hf: Any) -> Scheme:
    """The scheme of a checkpoint, from transformers' config of it.

    Raises ValueError for an unknown `quant_method`, and for values that its scheme refuses.
    """
    found = getattr(hf, "quantization_config", None)
    if not found:
        return UNQUANTIZED
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method not in CHECKPOINTS:
        known = ", ".join(map(repr, CHECKPOINTS)) or "none is yet"
        raise ValueError(
            f"quantization_config has quant_method {method!r}, which is not supported ({known}): "
            "use a checkpoint that is not quantized"
        )
    return CHECKPOINTS[method](found)


def _module(source: str) -> str:
    return source.removesuffix(".weight")
