"""The interface of a model: its layers' kinds, parameters and regions.

The inputs of regions (`region_inputs.py`) are a part of it: others import them from here.

T tokens | R rows (requests) | D hidden | K kv heads | V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.models.formats.format import Extent, Format, num_bytes
from nanovllm.models.formats.plain import PLAIN
from nanovllm.models.layer_state import (
    LayerState,
    PagedLatent,
    PageGroups,
    page_groups,
    state_of,
    with_state,
)
from nanovllm.models.param import Param
from nanovllm.models.region_inputs import (
    VARYING,
    AdapterRows,
    Batch,
    CacheAndStates,
    Kept,
    LatentCache,
    LayerCache,
    LayerCall,
    LayerKind,
    PagedCache,
    Pages,
    Params,
    States,
    cache_of,
    states_of,
)
from nanovllm.models.schemes import UNQUANTIZED, Part, Scheme

__all__ = [
    "VARYING",
    "AdapterRows",
    "Batch",
    "CacheAndStates",
    "Kept",
    "LatentCache",
    "LayerCache",
    "LayerCall",
    "LayerKind",
    "LoraSlots",
    "Model",
    "PagedCache",
    "Pages",
    "Param",
    "Params",
    "States",
    "cache_of",
    "states_of",
    "tower_shapes",
]


class LoraSlots(NamedTuple):
    """The slots of each linear layer: for `num` adapters, of ranks up to `max_rank`. With `experts`
    each expert has slots, too, with `biases` each bias of a linear layer, and with `embeddings` the
    table of tokens and the head."""

    num: int
    max_rank: int
    experts: bool = False
    biases: bool = False
    embeddings: bool = False


@dataclass(frozen=True)
class Model:
    """One checkpoint's architecture: its config, its layers, and the functions of its regions.

    `embed(config, embed_VD, token_T)` gives the hidden state [T, D];
    `layer(config, call, w, kv, cos_sin_MH, batch, h_TD)` gives the next one, [R, D] if the batch
    has `keep_R`, where `kv` is what the layer keeps (`Kept`);
    `head(config, final_norm_D, head_VD, h_RD)` gives the logits [R, V], on several ranks the
    columns of this rank's `head_VD`. `call` is a `LayerCall`. All are pure functions at the top of
    a module: keys of programs name them by module and name. With `LoraSlots.embeddings`, `embed`
    and `head` have one more argument, the `AdapterRows` of the tokens.

    `outer_params(config)` and `layer_params(config, kind, layer_idx)` declare the parameters by the
    fields of `Params` and of `layer_type(kind)`, a named tuple. A tied head is not declared. Fields
    that a layer does not declare are None. The experts of a sparse layer are declared by the fields
    of one form of `experts.FORMS`; a layer has them, as they are stored, in its field `experts`.
    `kv_scales(config, weights)` gives the scales of one layer's fp8 cache, fp32 [K] for keys and
    for values; it is None if their bounds are not known.

    Tensors whose names begin with one of `read_elsewhere` are not of the text model. `tower` is its
    vision encoder, a `vision.vision_encoder.Tower`, `audio_tower` its audio encoder, an
    `audio.audio_encoder.AudioTower`; None without one. `scheme` chooses the formats of weights
    (`schemes.with_scheme`). With `lora` the layers have slots for adapters (`lora.with_lora`), and
    batches have `adapters`. `layer_ropes` are the numbers of the layers'
    rotary tables in `ModelConfig.ropes`; without them all layers have the first. Embeddings that a
    request gives are multiplied by `embed_factor`, as the checkpoint's table is when it is read.
    `layer_inputs(config, w, token_T, h_TD)` gives the inputs [L, T, P] that its layers have beside
    the hidden state, from the weights `Params.extra`; None for models without.
    `whole_groups` are the `page_groups` of the whole model, if this one is reduced.
    Parameters outside the layers may also be those of `extra_type`, a named tuple, in
    `Params.extra`. Another model has the `lent` fields of `Params` (`draft_head`).
    `pooler` is how a model pools, a `pooling.Pooler`; None if it generates. Then `pooler.embed` and
    `pooler.head` are in place of `embed` and `head`, and the weights are `pooling.PoolWeights`.

    On one of several ranks (tensor parallelism) `config` is this rank's, and `whole` that of all;
    parameters are declared by `whole`.

    Regions may read GRAPH_FIELDS only: these are in the keys of compiled programs.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "config", "layer_kinds", "embed", "layer", "head", "layer_ropes", "embed_factor",
        "layer_inputs",
    )  # fmt: skip

    config: ModelConfig
    layer_kinds: tuple[LayerKind, ...]
    embed: Callable[..., Tensor]
    layer: Callable[..., Tensor]
    head: Callable[..., Tensor]
    outer_params: Callable[[ModelConfig], dict[str, Param]]
    layer_params: Callable[[ModelConfig, LayerKind, int], dict[str, Param]]
    layer_type: Callable[[LayerKind], type[Any]]
    kv_scales: Callable[[ModelConfig, Any], tuple[Tensor, Tensor]] | None = None
    read_elsewhere: tuple[str, ...] = ()
    tower: Any = None
    audio_tower: Any = None
    whole: ModelConfig | None = None
    layer_ropes: tuple[int, ...] = ()
    embed_factor: float = 1.0
    scheme: Scheme = UNQUANTIZED
    lora: LoraSlots | None = None
    whole_groups: PageGroups | None = None
    extra_type: type[Any] | None = None
    lent: tuple[str, ...] = ()
    layer_inputs: Callable[..., Tensor] | None = None
    pooler: Any = None

    def __post_init__(self) -> None:
        num_kinds, num_layers = len(self.layer_kinds), self.config.num_layers
        if num_kinds != num_layers:
            raise ValueError(f"{num_kinds} layer kinds for {num_layers} layers")
        assert len(self.layer_ropes) in (0, num_layers)
        kinds = set(self.layer_kinds)
        if len({kind.name for kind in kinds}) < len(kinds):
            raise ValueError(f"two layer kinds have the same name: {sorted(kinds, key=str)}")

    @property
    def towers(self) -> dict[str, Any]:
        """The towers that the model has, by the names of their fields here and in `Params`."""
        both = {"tower": self.tower, "audio_tower": self.audio_tower}
        return {name: tower for name, tower in both.items() if tower is not None}

    @property
    def takes_embeddings(self) -> bool:
        """True if prompts often bring embeddings: there are programs that take them."""
        return bool(self.towers)

    @property
    def adds_to_last(self) -> bool:
        """True if given features are added to all tokens after the last layer too."""
        return self.config.num_deepstack >= self.config.num_layers

    # which programs exist ------------------------------------------------------------------------

    def layer_programs(self, *, keeps_last: bool) -> tuple[tuple[str, LayerKind], ...]:
        """The program of each layer in one step, as (region, kind).

        With `keeps_last` the step continues with the last token of each row only, from the
        attention of the last layer on: ordinary prefill does, decode and prompt log-probabilities
        do not.
        """
        names = ["layer"] * (len(self.layer_kinds) - 1)
        names.append("last_layer" if keeps_last else "layer")
        return tuple(zip(names, self.layer_kinds))

    @property
    def distinct_layers(self) -> tuple[int, ...]:
        """Indices of layers that together use every program of an ordinary step."""
        programs = self.layer_programs(keeps_last=True)
        return tuple(programs.index(program) for program in dict.fromkeys(programs))

    @property
    def last_layer_needs_own_program(self) -> bool:
        """True if prefill with prompt_logprobs needs a program that ordinary prefill does not."""
        return self.layer_kinds[-1] not in self.layer_kinds[:-1]

    def reduced(self) -> Model:
        """The model with `distinct_layers` alone: it has the same programs."""
        chosen = self.distinct_layers
        kinds = tuple(self.layer_kinds[layer_idx] for layer_idx in chosen)
        ropes = tuple(self.layer_ropes[layer_idx] for layer_idx in chosen if self.layer_ropes)
        num_deepstack = self.config.num_deepstack if self.adds_to_last else len(kinds) - 1
        num_deepstack = min(self.config.num_deepstack, num_deepstack)
        config = replace(self.config, num_layers=len(kinds), num_deepstack=num_deepstack)
        groups = self.page_groups.of_layers(chosen)
        return replace(
            self, config=config, layer_kinds=kinds, layer_ropes=ropes, whole_groups=groups
        )

    def with_scheme(self, scheme: Scheme) -> Model:
        """The model whose formats a scheme chooses. Layers of one kind in different formats become
        layers of several kinds. Raises ValueError for parameters that their formats do not take."""
        model = replace(self, scheme=scheme)
        outer, *layers = model.declared
        model.check_formats(*outer.values(), *filter(None, [model.tied_head]))
        known: dict[LayerKind, list[list[Any]]] = {}
        kinds = []
        for kind, params in zip(self.layer_kinds, layers):
            parts = model.check_formats(*params.values())
            stored = [
                (PLAIN if part.format.is_plain else part.format, part.param.shape) for part in parts
            ]
            of_kind = known.setdefault(kind, [])
            if stored not in of_kind:
                of_kind.append(stored)
            num = of_kind.index(stored)
            kinds.append(replace(kind, name=f"{kind.name}_format{num}") if num else kind)
        return replace(model, layer_kinds=tuple(kinds))

    def check_formats(self, *params: Param) -> list[Part]:
        """The parts of parameters. Raises ValueError for one that its format does not take, as a
        whole or as this rank's share."""
        parts = [part for param in params for part in self.scheme.parts(param)]
        for param, stored_as in parts:
            if not stored_as.is_plain and param.kind not in stored_as.kinds:
                what = "with experts" if param.kind == "experts" else "whose table is stored so"
                raise ValueError(
                    f"{self.scheme} is not supported for a model {what} "
                    f"({self.config.architecture})"
                )
            if refusal := stored_as.refusal(self.extent(param)):
                raise ValueError(
                    f"{self.scheme}: {param.sources[0]} {list(param.shape)} cannot be shared by "
                    f"{self.config.num_ranks} rank(s): {refusal}"
                )
        return parts

    def with_state_dtype(self, dtype: torch.dtype) -> Model:
        """The model with another dtype of the recurrent states that have a dtype of their own."""
        kinds = list(self.layer_kinds)
        for layer_idx, kind in enumerate(kinds):
            if (state := state_of(kind.keeps)) is not None:
                keeps = with_state(kind.keeps, state.with_dtype(dtype))
                kinds[layer_idx] = replace(kind, keeps=keeps)
        return replace(self, layer_kinds=tuple(kinds))

    def on_ranks(self, num_ranks: int) -> Model:
        """The model as each of `num_ranks` ranks has it. Raises ValueError if its heads, or the
        rows or columns of its parameters, cannot be shared evenly."""
        if num_ranks == 1:
            return self
        cfg, num_kv = self.config, self.config.num_kv_heads
        if cfg.num_heads % num_ranks or (num_kv % num_ranks and num_ranks % num_kv):
            raise ValueError(
                f"tensor_parallel_size is {num_ranks}: it must divide the {cfg.num_heads} "
                f"attention heads, and the {num_kv} key-value heads or be a multiple of them"
            )
        config = replace(
            cfg,
            num_heads=cfg.num_heads // num_ranks,
            num_kv_heads=-(-num_kv // num_ranks),
            num_ranks=num_ranks,
        )
        kinds = tuple(
            replace(kind, keeps=kind.keeps.on_ranks(num_ranks)) for kind in self.layer_kinds
        )
        model = replace(self, config=config, layer_kinds=kinds, whole=cfg)
        for group in model.declared:
            model.check_formats(*group.values())
        return model

    # sizes ---------------------------------------------------------------------------------------

    @property
    def declared(self) -> tuple[dict[str, Param], ...]:
        """The parameters outside the layers, then those of each layer."""
        cfg, numbered = self.whole or self.config, enumerate(self.layer_kinds)
        layers = (self.layer_params(cfg, kind, layer_idx) for layer_idx, kind in numbered)
        return (self.outer_params(cfg), *layers)

    @property
    def tied_head(self) -> Param | None:
        """The head that is the embedding table: a linear layer with the table's numbers."""
        if not self.config.tied_embeddings:
            return None
        return self._table._replace(kind="linear")

    @property
    def head_is_table(self) -> bool:
        """True if head and table are tied and in one format: then they are one weight."""
        head = self.tied_head
        return head is not None and self._formats(head) == self._formats(self._table)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that a step can read: a table only if it is the head."""
        return sum(map(self._num_bytes, self._read_params))

    @property
    def expert_bytes(self) -> int:
        """The part of `weight_bytes` that experts take."""
        return sum(self._num_bytes(param) for param in self._read_params if param.is_of_experts)

    @property
    def expert_formats(self) -> set[Format]:
        """The formats of all experts."""
        experts = (param for param in self._read_params if param.kind == "experts")
        return {stored_as for param in experts for stored_as in self._formats(param)}

    @property
    def param_bytes(self) -> int:
        """Bytes that all weights take on the device, those of a tower included."""
        tables = [param for param in self.declared[0].values() if param.kind == "table"]
        tables = tables[self.head_is_table :]  # the first is that of tokens
        table_bytes = sum(map(self._num_bytes, tables))
        tower_bytes = sum(
            math.prod(shape) * tower.config.dtype.itemsize
            for tower in self.towers.values()
            for shape in tower_shapes(tower)
        )
        return self.weight_bytes + table_bytes + tower_bytes

    def num_weights(self, *, of_experts: bool = False) -> int:
        """The numbers that a step can read, whatever their format; with `of_experts` those of
        experts."""
        params = (param for param in self._read_params if param.is_of_experts or not of_experts)
        return sum(math.prod(param.local(self.config.num_ranks).shape) for param in params)

    @property
    def kept(self) -> tuple[LayerState, ...]:
        """What each layer keeps between steps."""
        return tuple(kind.keeps for kind in self.layer_kinds)

    @property
    def is_recurrent(self) -> bool:
        """True if a layer keeps a state of each row."""
        return any(state_of(one) is not None for one in self.kept)

    @property
    def has_latents(self) -> bool:
        """True if layers keep latents, and no keys and values."""
        return any(isinstance(one, PagedLatent) for one in self.kept)

    @property
    def page_groups(self) -> PageGroups:
        """The layers with pages, in groups with one block table each."""
        return self.whole_groups or page_groups(self.kept, self.config.max_position)

    @property
    def _table(self) -> Param:
        return self.declared[0]["embed_VD"]

    @property
    def _read_params(self) -> list[Param]:
        """All parameters without tables, or with the table of tokens as the head that it is."""
        whole, *layers = self.declared
        outer = {name: param for name, param in whole.items() if param.kind != "table"}
        if self.config.tied_embeddings:
            outer["head_VD"] = whole["embed_VD"]._replace(kind="linear")
        return [param for group in (outer, *layers) for param in group.values()]

    def extent(self, param: Param) -> Extent:
        """The extent of a parameter's part on this rank, for its format."""
        return param.extent(self.config.num_ranks, self.config.dtype)

    def _formats(self, param: Param) -> list[Format]:
        return [part.format for part in self.scheme.parts(param)]

    def _num_bytes(self, param: Param) -> int:
        parts = self.scheme.parts(param)
        return sum(num_bytes(part.format, self.extent(part.param)) for part in parts)


def tower_shapes(tower: Any) -> list[tuple[int, ...]]:
    """The shapes of all parameters of a tower, in the order of computation."""
    found: list[tuple[int, ...]] = []

    def note(param: Param) -> Any:
        found.append(param.shape)

    tower.build(note)
    return found
