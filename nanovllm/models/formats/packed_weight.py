"""The stored weight of formats with codes of 4 or 8 bits and scales of groups of inputs.

O outputs | D depth | C bytes of codes in a row | G groups of inputs | E experts | T tokens
K experts per token. See `reference.packed` for the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.reference.packed import Codes, interleave, interleave_groups


class PackedWeight(NamedTuple):
    """weight = level · scale + offset, in the order of inputs that `order_D` gives.

    code_OC: bytes, [.., O, C]. scale_OG, offset_OG: [.., O, G], of `group` inputs each; no offset
    is 0. table: the levels of codes; None: the codes themselves. order_D: the column d of the
    weight is for input order_D[d], int32 [.., D]; None: for input d. There may be more columns than
    the `depth` inputs: those that are for input `depth`, which is 0, fill groups up.
    """

    code_OC: Tensor
    scale_OG: Tensor
    offset_OG: Tensor | None
    table: Tensor | None
    order_D: Tensor | None
    bits: int
    group: int
    depth: int

    @property
    def codes(self) -> Codes:
        """The arguments of ops that hold the weight, if it has no order of inputs."""
        return *self[:4], self.bits, self.group

    @property
    def num_columns(self) -> int:
        return self.depth if self.order_D is None else self.order_D.shape[-1]

    def interleaved(self) -> PackedWeight:
        """The same weight with interleaved rows. It takes as much memory again until the caller
        drops this one."""
        code, scale = interleave(self.code_OC, self.scale_OG)
        offset = None if self.offset_OG is None else interleave_groups(self.offset_OG)
        return self._replace(code_OC=code, scale_OG=scale, offset_OG=offset)

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        if self.order_D is not None:
            x_TD = self._padded(x_TD).index_select(-1, self.order_D)
        return ops.packed_linear(x_TD, *self[:4], self.bits, self.group, bias_O, residual_TO)

    def rows(self, first: int) -> Tensor:
        return self.real()[first:]

    def lookup(self, row_T: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.order_D is None, "tables have inputs in order"
        found: Tensor = ops.packed_lookup(
            row_T, *self[:4], self.bits, self.group, self.depth, dtype
        )
        return found

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        if self.order_D is not None:
            order_TKD = self.order_D[expert_TK.long()].long()
            x = x if x.dim() == 3 else x.unsqueeze(1).expand(-1, expert_TK.shape[1], -1)
            x = self._padded(x).gather(-1, order_TKD)
        return ops.packed_expert_linear(x, expert_TK, *self[:4], self.bits, self.group)

    def experts(
        self,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        down: PackedWeight,
        residual_TD: Tensor | None,
        local_X: Tensor | None,
    ) -> Tensor | None:
        """See `formats.experts`; None if the device has no kernel, or inputs change places."""
        is_ordered = self.order_D is not None or down.order_D is not None
        if is_ordered or not ops.has_kernel(ops.packed_experts, x_TD.device):
            return None
        result: Tensor = ops.packed_experts(
            x_TD, weight_TK, expert_TK, *self.codes, *down.codes, residual_TD, local_X
        )
        return result

    def real(self) -> Tensor:
        """The real values [.., O, D] in fp32, in the order of inputs."""
        value = reference.packed.unpacked(*self[:4], self.bits, self.group, self.num_columns)
        if self.order_D is None:
            return value
        found = value.new_zeros((*value.shape[:-1], self.depth + 1))
        found.scatter_(-1, self.order_D.long().unsqueeze(-2).expand_as(value), value)
        return found[..., : self.depth]

    def _padded(self, x: Tensor) -> Tensor:
        """The inputs, and a 0 for the columns that fill groups up, if there are any."""
        assert self.order_D is not None
        has_more = self.num_columns > self.depth
        return torch.nn.functional.pad(x, (0, 1)) if has_more else x


def arranged(weight: Any, prefers_interleaved: Callable[[Codes, int], bool]) -> Any:
    """A weight of any format. Rows of packed ones in it are interleaved where that is preferred."""
    if isinstance(weight, PackedWeight):
        prefers = prefers_interleaved(weight.codes, weight.num_columns)
        return weight.interleaved() if prefers else weight
    if not isinstance(weight, tuple):
        return weight
    fields = [arranged(one, prefers_interleaved) for one in weight]
    return type(weight)(*fields) if hasattr(weight, "_fields") else tuple(fields)
