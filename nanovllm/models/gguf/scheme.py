"""Which matrices of a GGUF file are in which type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nanovllm.models.formats.format import Format
from nanovllm.models.formats.gguf import of_type
from nanovllm.models.formats.plain import PLAIN
from nanovllm.models.gguf.names import without_number
from nanovllm.models.param import Param
from nanovllm.models.schemes import BySource


@dataclass(frozen=True)
class GgufTypes(BySource):
    """`types` are the names of matrices in codes, those of experts without a number, with their
    types. All other tensors are floating point numbers. keeps_blocks: the device has products of
    blocks."""

    types: tuple[tuple[str, str], ...]
    keeps_blocks: bool = True

    def __str__(self) -> str:
        return f"GGUF with {', '.join(sorted({one for _, one in self.types}))}"

    def format(self, param: Param, source: str) -> Format:
        joined = self._formats.get(param.other_name or "")
        return joined or self._formats.get(without_number(source), PLAIN)

    @cached_property
    def _formats(self) -> dict[str, Format]:
        return {name: of_type(one, keeps_blocks=self.keeps_blocks) for name, one in self.types}
