"""Chooses the format of each parameter, by the option `quantization` or the checkpoint.

A scheme chooses formats for linear layers, experts and embedding tables. All other parameters are
plain tensors. The sources of one matrix may differ in format: then the matrix has several parts.
`quant_methods` makes the scheme of a checkpoint.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from nanovllm.models.checkpoint import plain_name, spellings
from nanovllm.models.formats.dequantized import Dequantized
from nanovllm.models.formats.format import Format
from nanovllm.models.formats.fp8 import Fp8Rounded
from nanovllm.models.formats.int8 import Int8
from nanovllm.models.formats.plain import PLAIN
from nanovllm.models.formats.rounded import Rounded
from nanovllm.models.param import PACKABLE, Param

HEAD = "lm_head.weight"
REGEX = "re:"  # before a regular expression, as compressed-tensors has it


class Part(NamedTuple):
    """A parameter in one format, or those of its rows that are."""

    param: Param
    format: Format


class Scheme(ABC):
    """Chooses a format for each parameter. Schemes are frozen dataclasses; `str` names one in
    messages."""

    @abstractmethod
    def parts(self, param: Param) -> tuple[Part, ...]:
        """The parts of a parameter, in the order of its rows. Raises ValueError if the experts of
        a layer differ in format."""


@dataclass(frozen=True)
class Converted(Scheme):
    """All linear layers, and experts if the format takes them, are converted to one format as they
    are read. The head is one of the layers if it `has_head`. A tied head is converted then, and the
    embedding table stays plain, since its rows are looked up."""

    linear: Format = PLAIN
    has_head: bool = True

    def __str__(self) -> str:
        return f"quantization {self.linear.name!r}"

    def parts(self, param: Param) -> tuple[Part, ...]:
        kinds = self.linear.kinds & {"linear", "experts"}
        is_plain = param.kind not in kinds or param.compressed
        if is_plain or (param.is_vocab and not self.has_head):
            return (Part(param, PLAIN),)
        return (Part(param, self.linear),)


UNQUANTIZED = Converted()


@dataclass(frozen=True)
class Dequantizing(Scheme):
    """The scheme of a checkpoint on a device that multiplies plain tensors alone."""

    stored: Scheme

    def __str__(self) -> str:
        return f"{self.stored}, dequantized"

    def parts(self, param: Param) -> tuple[Part, ...]:
        return tuple(
            part._replace(format=Dequantized(part.format)) if part.format.is_packed else part
            for part in self.stored.parts(param)
        )


class BySource(Scheme):
    """A scheme that chooses for each source of a parameter, as checkpoints do by modules."""

    @abstractmethod
    def format(self, param: Param, source: str) -> Format:
        """The format of a source of a linear layer, of experts or of a table."""

    def parts(self, param: Param) -> tuple[Part, ...]:
        if param.kind not in PACKABLE or param.compressed:
            return (Part(param, PLAIN),)
        of_sources = [self.format(param, source) for source in param.sources]
        per_matrix = len(of_sources) // param.num_matrices
        chosen = of_sources[:per_matrix]
        for i, one in enumerate(of_sources):
            if one != chosen[i % per_matrix]:
                raise ValueError(
                    f"quantization_config gives {param.sources[i % per_matrix]} the format "
                    f"{chosen[i % per_matrix].name} and {param.sources[i]} {one.name}: the experts "
                    "of a layer have one format"
                )
        bounds = [
            i for i in range(1, per_matrix)
            if chosen[i] != chosen[i - 1] or not chosen[i].joins_sources
        ]  # fmt: skip
        ranges = zip([0, *bounds], [*bounds, per_matrix])
        return tuple(Part(param.some(first, stop), chosen[first]) for first, stop in ranges)


class Modules:
    """The modules of a checkpoint that its config names: by their names, by the beginning, middle
    or end of these in whole parts ("lm_head", "model.layers.0", "mlp.gate"), or after "re:" by a
    regular expression for one of their `spellings`. Raises ValueError for an invalid expression."""

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
        names, spelled = module.split("."), spellings(module)
        bounds = combinations(range(len(names) + 1), 2)
        return any(".".join(names[i:j]) in self._parts for i, j in bounds) or any(
            expression.match(name) for expression in self._expressions for name in spelled
        )


@dataclass(frozen=True)
class Packed(BySource):
    """A checkpoint that stores linear layers and experts in one format.

    The `plain` modules are not among them. The head and the embedding table are if it `has_head`
    and `has_table`; a tied head is the table. Parameters of other `kinds` are plain.
    """

    quant_method: str
    stored: Format
    plain: Modules = field(default_factory=Modules)
    has_head: bool = False
    has_table: bool = False
    kinds: frozenset[str] = PACKABLE

    def __str__(self) -> str:
        return f"quant_method {self.quant_method!r}"

    def format(self, param: Param, source: str) -> Format:
        if param.kind not in self.kinds:
            return PLAIN
        if param.is_vocab and not (self.has_head if source == HEAD else self.has_table):
            return PLAIN
        names = (source,) if param.other_name is None else (source, param.other_name)
        is_plain = any(name.removesuffix(".weight") in self.plain for name in names)
        return PLAIN if is_plain else self.stored


# The values of the option `quantization`; `quant_methods` has those of checkpoints.
# fp8 has a scale for each output: blocks of 128 × 128 are no more exact, see docs/log.md.
OPTIONS: dict[str, Converted] = {
    "int8": Converted(Int8()),
    "fp8": Converted(Fp8Rounded((1, 0), "weight_scale")),
    "int4": Converted(Rounded(), has_head=False),
}
