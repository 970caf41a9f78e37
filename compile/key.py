"""The key of an artifact. Importing this module does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Key:
    """Named ingredients. Keys with equal ingredients, in any order, are equal."""

    ingredients: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        text = json.dumps(dict(self.ingredients), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Mapping[str, str]) -> list[str]:
        """One line per ingredient that differs in `other`; the shapes of inputs come last."""
        mine, theirs = self.ingredients.get, other.get
        names = sorted({*self.ingredients, *other}, key=lambda n: (n.startswith("input "), n))
        changed = [name for name in names if mine(name) != theirs(name)]
        return [f"{n}: {_short(mine(n))} is wanted, {_short(theirs(n))} is stored" for n in changed]


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 120 else value[:117] + "..."
