"""Experts with adapters: each expert of each slot for adapters has matrices of its own.

To `ops.add_lora` the experts of all slots are slots, and each pair of a token and an expert is a
token.

T tokens | K experts per token | E experts here | N slots | X rank | D depth | O outputs
L = X · parts of the outputs | P = T · K
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import formats
from nanovllm.models.experts.expert_parallel import ExpertParallel
from nanovllm.models.formats import Weight
from nanovllm.models.model import AdapterRows


class Matrices(NamedTuple):
    """Those of the adapters in the slots, for one of an expert's two products. `rows` are the sizes
    of the parts of its outputs, as in `ops.add_lora`."""

    a_NELD: Tensor
    b_NEOX: Tensor
    rows: tuple[int, ...]


class Adapted(NamedTuple):
    """A layer's experts, `Stacked` or `ExpertParallel`, and the matrices of their adapters."""

    base: Any
    gate_up: Matrices
    down: Matrices


class Bound(NamedTuple):
    """Experts for the rows of one step: see `lora.regions.Bound`."""

    weight: Adapted
    all_T: AdapterRows
    kept_R: AdapterRows | None


Stored = Bound


class _Product(NamedTuple):
    """One of the products for the pairs of a step."""

    base: Weight
    matrices: Matrices
    rows: AdapterRows

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        """See `Stored.expert_linear`."""
        y_TKO = formats.expert_linear(x, expert_TK, self.base)
        if x.dim() == 2:
            x = x.unsqueeze(1).expand(-1, expert_TK.shape[1], -1)
        a_NELD, b_NEOX, rows = self.matrices
        both = a_NELD.flatten(0, 1), b_NEOX.flatten(0, 1)
        y_PO = ops.add_lora(y_TKO.flatten(0, 1), x.flatten(0, 1), *self.rows, *both, rows)
        return y_PO.view(y_TKO.shape)


def apply(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, stored: Bound, residual_TD: Tensor | None
) -> Tensor:
    """See `experts.Form.apply`."""
    (base, gate_up, down), rows, kept_R = stored
    if kept_R is not None and len(x_TD) == len(kept_R.adapter_T):
        rows = kept_R
    local_X = base.local_X if isinstance(base, ExpertParallel) else None
    here_TK = (expert_TK if local_X is None else local_X[expert_TK.long()]).long()
    adapter_T1 = rows.adapter_T.unsqueeze(1)
    slot_TK = (adapter_T1 - 1) * gate_up.a_NELD.shape[1] + here_TK + 1
    slot_TK = torch.where((adapter_T1 > 0) & (here_TK >= 0), slot_TK, 0)
    slot_P = slot_TK.flatten()
    of_pairs = AdapterRows(slot_P, *ops.adapter_tiles(slot_P))
    products = (
        _Product(base.gate_up_EGD, gate_up, of_pairs),
        _Product(base.down_EDF, down, of_pairs),
    )
    return formats.experts_by_products(
        ops.silu_mul, x_TD, weight_TK, expert_TK, products, residual_TD, local_X
    )
