"""LoRA in the graph: linear layers and tables whose rows have adapters, and what has them.

T tokens | R rows | D depth | O outputs | N slots | M = N + 1 | P parts of the outputs
X rank | L = P · X | V rows of a table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
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


class AdaptedTable(NamedTuple):
    """An embedding table, in any format, and the matrices of the adapters in its slots, as in
    `Adapted`. `a_NVX` has a row for each token; the identity `one_NXX` is in place of an a of
    `ops.add_lora`, since a lookup gives the inner values."""

    base: Weight
    a_NVX: Tensor
    b_NDX: Tensor
    one_NXX: Tensor


class BoundTable(NamedTuple):
    """A table for the tokens of one step."""

    weight: AdaptedTable
    all_T: AdapterRows

    def lookup(self, row_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the table, plus what the adapters of the tokens add."""
        base, a_NVX, b_NDX, one_NXX = self.weight
        slot_T = (self.all_T.adapter_T - 1).clamp(min=0)  # those without one are not changed
        z_TX = formats.lookup(a_NVX.flatten(0, 1), slot_T * a_NVX.shape[1] + row_T, dtype)
        y_TD = formats.lookup(base, row_T, dtype)
        return ops.add_lora(y_TD, z_TX, *self.all_T, one_NXX, b_NDX, [b_NDX.shape[1]])


def embed(
    inner: Callable[..., Tensor],
    cfg: ModelConfig,
    embed_VD: AdaptedTable,
    token_T: Tensor,
    adapters: AdapterRows,
) -> Tensor:
    """`Model.embed`, `inner`, of a table with slots."""
    return inner(cfg, BoundTable(embed_VD, adapters), token_T)


def head(
    inner: Callable[..., Tensor],
    cfg: ModelConfig,
    final_norm_D: Tensor,
    head_VD: Adapted,
    h_RD: Tensor,
    adapters: AdapterRows,
) -> Tensor:
    """`Model.head`, `inner`, of a head with slots."""
    return inner(cfg, final_norm_D, Bound(head_VD, adapters, None), h_RD)


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
    assert model.lora is not None
    adapted_regions = ("embed", "layer", "head") if model.lora.embeddings else ("layer",)
    plain = {name: getattr(model, name).args[0] for name in adapted_regions}
    bases = (
        {
            name: one.base
            for name, one in w._asdict().items()
            if isinstance(one, Adapted | adapted.Adapted)
        }
        for w in params.layers
    )
    layers = tuple(w._replace(**base) for w, base in zip(params.layers, bases))
    outer: dict[str, Any] = {
        name: base_of(getattr(params, name)) for name in ("embed_VD", "head_VD")
    }
    return replace(model, lora=None, **plain), params._replace(layers=layers, **outer)


def base_of(weight: Weight) -> Weight:
    """A weight outside the layers as it is without adapters."""
    return weight.base if isinstance(weight, Adapted | AdaptedTable) else weight


def with_lora(model: Model, slots: LoraSlots) -> Model:
    """The model with slots for adapters in the linear layers of its layers, and perhaps in its
    table and head."""
    if slots.embeddings:
        model = replace(model, embed=partial(embed, model.embed), head=partial(head, model.head))
    return replace(model, layer=partial(layer, model.layer), lora=slots)
