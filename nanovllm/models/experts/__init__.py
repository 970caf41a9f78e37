"""How the matrices of a layer's experts are stored: one file per form, and their common interface.

To add a form, write a file that provides `Form` and enter it in `FORMS`.
T tokens | K experts per token | E experts | D hidden | F expert width | G = 2F.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from nanovllm.models.experts import (
    adapted,
    clamped,
    compressed,
    expert_parallel,
    offloaded,
    stacked,
    ungated,
)
from nanovllm.models.experts.offloaded import Offloaded

# A layer's stored experts: a named tuple of tensors that is specific to its form.
Experts = tuple[Any, ...]


class Form(Protocol):
    """What the file of a form provides."""

    @property
    def Stored(self) -> type[Any]:
        """The named tuple of a layer's stored experts, which no other form uses.

        Its fields are the names by which a model declares them.
        """

    def apply(
        self,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        stored: Any,
        residual_TD: Tensor | None,
    ) -> Tensor:
        """The experts' weighted sum for each token, plus the residual: see
        `reference.experts.experts`."""


FORMS: tuple[Form, ...] = (
    expert_parallel, stacked, compressed, offloaded, ungated, adapted,
)  # fmt: skip
# Supersets first: `gather` takes the first type whose fields without a default are all present.
# The first one has an `apply` of its own. No checkpoint has `adapted` experts.
TYPES: tuple[type[Any], ...] = (clamped.Clamped, *(form.Stored for form in FORMS[:-1]))


def prepare(
    expert_TK: Tensor,
    stored: Experts,
    kv_slot_T: Tensor,
    num_pad_slots: int,
    *,
    ahead: bool = False,
) -> Tensor:
    """Bring chosen experts to where `apply` reads them; returns the experts to pass to `apply`.

    Tokens whose cache slot is below `num_pad_slots` are padding: nothing is brought for them, and
    their experts may change. With `ahead` the experts are a prediction.
    """
    if isinstance(stored, Offloaded):
        return offloaded.prepare(expert_TK, stored, kv_slot_T, num_pad_slots, ahead=ahead)
    return expert_TK


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Experts, residual_TD: Tensor | None
) -> Tensor:
    """The experts' weighted sum for each token, plus the residual, for experts in any form."""
    form = next(one for one in FORMS if isinstance(stored, one.Stored))
    return form.apply(x_TD, weight_TK, expert_TK, stored, residual_TD)


def gather(values: dict[str, Any]) -> Experts:
    """Remove a layer's stored experts from its parameters by name; returns them in their form."""
    present = set(values)
    of_type = next(one for one in TYPES if set(one._fields) - set(one._field_defaults) <= present)
    stored: Experts = of_type(*(values.pop(name, None) for name in of_type._fields))
    return stored
