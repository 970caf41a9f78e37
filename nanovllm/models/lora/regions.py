"""LoRA in the graph: linear layers whose rows have adapters, and the layers that have them.

T tokens | R rows | D depth | O outputs | N slots | M = N + 1 | P parts of the outputs
X rank | L = P · X
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import formats
from nanovllm.models.config import ModelConfig
from nanovllm.models.experts import adapted
from nanovllm.models.formats import Weight
from nanovllm.models.model import AdapterRows, LayerCall, LoraSlots, Model, Params


class Adapted(NamedTuple):
    """The weight of a linear layer, in any format, and the matrices of the adapters in its slots.

    `rows` are the sizes of the parts of its outputs (`ops.add_lora`). Slots without an adapter are
    zero, and those of a lower rank are padded with zeros. `c_MO` is what adapters add to the bias,
    zeros for none first; None if they do not change it.
    """

    base: Weight
    a_NLD: Tensor
    b_NOX: Tensor
    rows: tuple[int, ...]
    c_MO: Tensor | None = None


class Bound(NamedTuple):
    """The weight of a linear layer for the rows of one step.

    `all_T` are the adapters of all tokens, `kept_R` those of the tokens that a layer keeps after
    attention (`Batch.keep_R`), which are fewer.
    """

    weight: Adapted
    all_T: AdapterRows
    kept_R: AdapterRows | None

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        """x · weightᵀ + bias + residual, plus what the adapters of the rows add."""
        weight, rows = self.weight, self.all_T
        if self.kept_R is not None and x_TD.shape[0] == self.kept_R.adapter_T.shape[0]:
            rows = self.kept_R
        y_TO = formats.linear(x_TD, weight.base, bias_O)
        if weight.c_MO is not None:
            y_TO = y_TO + weight.c_MO.index_select(0, rows.adapter_T)
        matrices = weight.a_NLD, weight.b_NOX, weight.rows
        return ops.add_lora(y_TO, x_TD, *rows, *matrices, residual_TO)


def layer(
    inner: Callable[..., Tensor], cfg: ModelConfig, call: LayerCall, w: Any, *inputs: Any
) -> Tensor:
    """A layer of an architecture, `inner`, whose linear layers are `Adapted`.

    The arguments after `inner` are those of `Model.layer`.
    """
    kv, cos_sin_MH, batch, h_TD = inputs
    rows, keep_R = batch.adapters, batch.keep_R
    assert rows is not None
    if keep_R is not None and keep_R.shape[0] == h_TD.shape[0]:
        # all would be kept, perhaps in another order: then sizes do not tell the two apart
        batch = batch._replace(keep_R=None)
        h_TD = layer(inner, cfg, call, w, kv, cos_sin_MH, batch, h_TD)
        return h_TD.index_select(0, keep_R)
    kept_R = None if keep_R is None else batch.kept_adapters
    types = {Adapted: Bound, adapted.Adapted: adapted.Bound}
    bound = {
        name: types[type(weight)](weight, rows, kept_R)
        for name, weight in w._asdict().items()
        if type(weight) in types
    }
    return inner(cfg, call, w._replace(**bound), kv, cos_sin_MH, batch, h_TD)


def without_slots(model: Model, params: Params) -> tuple[Model, Params]:
    """A model of `with_lora` and its weights as they are without adapters, in the same memory."""
    assert isinstance(model.layer, partial)
    (inner,) = model.layer.args
    bases = (
        {
            name: one.base
            for name, one in w._asdict().items()
            if isinstance(one, Adapted | adapted.Adapted)
        }
        for w in params.layers
    )
    layers = tuple(w._replace(**base) for w, base in zip(params.layers, bases))
    return replace(model, layer=inner, lora=None), params._replace(layers=layers)


def with_lora(model: Model, slots: LoraSlots) -> Model:
    """The model with slots for adapters in the linear layers of its layers."""
    return replace(model, layer=partial(layer, model.layer), lora=slots)
