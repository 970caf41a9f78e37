"""What a model is to the rest of the engine: its layers' kinds, parameters, regions and inputs.

T tokens | R rows (requests) | S = R + 1 | P blocks per row | C cache blocks | B block size
D hidden | K kv heads | H head size | V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import FORMATS, PLAIN, Weight

ParamKind = Literal[
    "linear", "norm", "bias", "table", "router", "experts", "basis", "places", "conv"
]  # fmt: skip
# (tensor, rows of each source in it), see `Param`
Adapt = Callable[[Tensor, tuple[int, ...]], object]


class Param(NamedTuple):
    """One parameter: the checkpoint tensors `sources`, stacked along axis 0, have `shape`.

    `kind` says how it is stored and initialised: "linear" is the weight of a linear layer [O, D]
    and is stored in the engine's weight format, "table" is an embedding table, "conv" the kernel of
    a convolution, "router" the matrix that scores experts, "experts" the matrices of a layer's
    experts [E, O, D], whose rows are stacked expert by expert, "basis" a matrix that compressed
    experts share, "places" where a rank's experts are in its stack (`Shard.places`), which no
    checkpoint has. `parts` are the row counts of the sources. A checkpoint may have one tensor of
    `shape` with the name `other_name` instead. If it `may_be_transposed`, its last two axes may be
    exchanged there.

    `shard_axis` is the axis of the sources that tensor parallelism splits, each source by itself;
    None for a parameter that every rank has (`shards`). `units` are the numbers of heads in the
    sources, which are not split; empty if every row or column may go to another rank. An `is_vocab`
    parameter has a row for each token id: its last part is padded. An `is_first_only` parameter is
    zero on all ranks but the first, since the sum over the ranks must have it once. The experts of
    an `is_spread` parameter are not split: each rank has an equal share of them.

    `adapt` changes a tensor in place after it was read: it folds what a family does to a weight's
    result, or to its rows' order, into the weight. It gets this rank's part, with the row count of
    each source in it.

    If `source_shape` is given, each source has this shape and fills the first rows and columns of
    its part; the rest is zero. Only towers have such parameters (`vision.weights`).

    A `compressed` parameter is read from `svd_experts`, which knows its sources. The checkpoint's
    tensors that `replaces` names are not read.
    """

    kind: ParamKind
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    parts: tuple[int, ...]
    shard_axis: int | None
    other_name: str | None = None
    compressed: bool = False
    replaces: tuple[str, ...] = ()
    units: tuple[int, ...] = ()
    is_vocab: bool = False
    is_first_only: bool = False
    is_spread: bool = False
    may_be_transposed: bool = False
    adapt: Adapt | None = None
    source_shape: tuple[int, ...] | None = None

    @classmethod
    def one(cls, kind: ParamKind, source: str, *shape: int, shard_axis: int | None = None) -> Param:
        """A parameter that is one tensor of the checkpoint."""
        return cls(kind, shape, (source,), (shape[0],), shard_axis)

    @classmethod
    def vocab(cls, kind: ParamKind, source: str, *shape: int) -> Param:
        """A tensor of the checkpoint with a row for each token id."""
        return cls(kind, shape, (source,), (shape[0],), 0, is_vocab=True)

    @classmethod
    def stack(
        cls, kind: ParamKind, sources: tuple[str, ...], parts: tuple[int, ...], *rest: int
    ) -> Param:
        """Several tensors with the same shape `rest` beyond axis 0, split along axis 0."""
        return cls(kind, (sum(parts), *rest), sources, parts, 0)

    def share(self, source_idx: int, length: int, num_ranks: int) -> int:
        """How many of `length` rows or columns of a source each of `num_ranks` ranks has.

        Raises ValueError if they cannot be shared evenly.
        """
        units = self.units[source_idx] if self.units else length
        if units % num_ranks == 0:
            return length // num_ranks
        if self.is_vocab:
            return -(-length // num_ranks)
        if self.units and num_ranks % units == 0:
            return length // units
        what = "heads" if self.units else "rows" if self.shard_axis == 0 else "columns"
        raise ValueError(
            f"{num_ranks} ranks cannot share the {units} {what} of {self.sources[source_idx]} "
            "evenly: choose another tensor_parallel_size"
        )

    def local(self, num_ranks: int) -> Param:
        """The parameter with the sizes that it has on each of `num_ranks` ranks."""
        axis = self.shard_axis
        if self.is_spread:
            num = self.shape[0] // num_ranks
            parts = self.parts[: len(self.parts) // num_ranks]
            return self._replace(shape=(num, *self.shape[1:]), parts=parts)
        if axis is None or num_ranks == 1:
            return self
        shape, parts = list(self.shape), self.parts
        if axis:
            shape[-1] = self.share(0, shape[-1], num_ranks)
        else:
            parts = tuple(self.share(i, rows, num_ranks) for i, rows in enumerate(parts))
            rows_axis = 1 if self.kind == "experts" else 0
            shape[rows_axis] = sum(parts) // math.prod(shape[:rows_axis])
        return self._replace(shape=tuple(shape), parts=parts)


class Params(NamedTuple):
    """All weights. `layers` are the architecture's own named tuples.

    `head_VD` is `embed_VD` itself where the checkpoint ties them and the format keeps it.
    """

    embed_VD: Tensor
    layers: tuple[Any, ...]
    final_norm_D: Tensor
    head_VD: Weight
    tower: Any = None  # `vision.interface.TowerWeights` of a model that sees
    audio_tower: Any = None  # `audio.interface.AudioWeights` of a model that hears


class LayerCache(NamedTuple):
    """One layer's keys and values; with scales they are float8_e4m3fn and mean value · scale."""

    k_CBKH: Tensor
    v_CBKH: Tensor
    k_scale_K: Tensor | None = None
    v_scale_K: Tensor | None = None


# Region inputs whose first dimension may vary between runs of one program: the number of cache
# blocks, and the number of positions in the rotary table.
VARYING = ("k_CBKH", "v_CBKH", "cos_sin_MH")


class Batch(NamedTuple):
    """The inputs that change between two steps of one bucket."""

    rope_pos_T: Tensor  # rotation position of each token
    slot_T: Tensor  # cache slot that each token writes: block · B + offset
    block_table_RP: Tensor
    seq_len_R: Tensor  # tokens of each row, this step's included
    q_start_S: Tensor  # row r owns tokens q_start[r] .. q_start[r + 1] − 1
    keep_R: Tensor | None = None  # the only tokens that a layer goes on with after attention


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes the layers of one model: layers of one kind share their programs.

    Layers of one kind declare parameters of the same shapes. `window` is the number of newest
    positions that a query sees, itself included; 0 means all positions. A `sparse` layer has
    experts.
    """

    name: str  # in the names of programs
    window: int = 0
    sparse: bool = False


class LayerCall(NamedTuple):
    """The static arguments of a layer's program.

    `attention` is a key of `ops.ATTENTION`, `max_q_len` the most tokens of one row. With `predicts`
    a layer whose experts are in the host's memory fetches before attention those that its input
    would choose.
    """

    attention: str
    kind: LayerKind
    max_q_len: int
    predicts: bool = False


@dataclass(frozen=True)
class Model:
    """One checkpoint's architecture: its config, its layers, and the functions of its regions.

    `embed(config, embed_VD, token_T)` gives the hidden state [T, D];
    `layer(config, call, w, kv, cos_sin_MH, batch, h_TD)` gives the next one, [R, D] if the batch
    has `keep_R`; `head(config, final_norm_D, head_VD, h_RD)` gives the logits [R, V], on several
    ranks the columns of this rank's `head_VD`. `call` is a `LayerCall`. All are pure functions at
    the top of a module: keys of programs name them by module and name.

    `outer_params(config)` and `layer_params(config, kind, layer_idx)` declare the parameters by the
    fields of `Params` and of `layer_type(kind)`, a named tuple. A tied head is not declared. Fields
    that a layer does not declare are None. The experts of a sparse layer are declared by the fields
    of one form of `experts.FORMS`; a layer has them, as they are stored, in its field `experts`.
    `kv_scales(config, weights)` gives the scales of one layer's fp8 cache, fp32 [K] for keys and
    for values; it is None if their bounds are not known.

    Tensors whose names begin with one of `read_elsewhere` are not of the text model. `tower` is the
    `vision.interface.Tower` of a model that sees, `audio_tower` the `audio.interface.AudioTower` of
    one that hears.
    `layer_ropes` are the numbers of the layers' rotary tables in `ModelConfig.ropes`; without them
    all layers have the first. Embeddings that a request gives are multiplied by `embed_factor`, as
    the checkpoint's table is when it is read.

    On one of several ranks (tensor parallelism) `config` is this rank's, and `whole` that of all;
    parameters are declared by `whole`.

    Regions may read GRAPH_FIELDS only: these are in the keys of compiled programs.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "config", "layer_kinds", "embed", "layer", "head", "layer_ropes", "embed_factor",
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
        return self.config.num_added >= self.config.num_layers

    # which programs exist ------------------------------------------------------------------------

    def layer_programs(self, *, keeps_last: bool) -> tuple[tuple[str, LayerKind], ...]:
        """The program of each layer in one step, as (region, kind).

        With `keeps_last` the step goes on with the last tokens of each row only, from the attention
        of the last layer on: ordinary prefill does, decode and prompt log-probabilities do not.
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
        num_added = self.config.num_added if self.adds_to_last else len(kinds) - 1
        num_added = min(self.config.num_added, num_added)
        config = replace(self.config, num_layers=len(kinds), num_added=num_added)
        return replace(self, config=config, layer_kinds=kinds, layer_ropes=ropes)

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
        model = replace(self, config=config, whole=cfg)
        for param in (param for group in model.declared for param in group.values()):
            param.local(num_ranks)
        return model

    # sizes ---------------------------------------------------------------------------------------

    @property
    def declared(self) -> tuple[dict[str, Param], ...]:
        """The parameters outside the layers, then those of each layer."""
        cfg, numbered = self.whole or self.config, enumerate(self.layer_kinds)
        layers = (self.layer_params(cfg, kind, layer_idx) for layer_idx, kind in numbered)
        return (self.outer_params(cfg), *layers)

    def weight_bytes(self, weight_format: str) -> int:
        """Bytes of all weights that a step can read: the table only if it is the head."""
        return sum(self._num_bytes(param, weight_format) for param in self._read_params)

    @property
    def expert_bytes(self) -> int:
        """The part of `weight_bytes` that experts take."""
        params = (param for param in self._read_params if param.kind == "experts")
        return sum(self._num_bytes(param, PLAIN) for param in params)

    def param_bytes(self, weight_format: str) -> int:
        """Bytes that all weights take on the device, those of a tower included."""
        table = self.declared[0]["embed_VD"]
        is_head = self.config.tied_embeddings and weight_format == PLAIN
        table_bytes = 0 if is_head else self._num_bytes(table, weight_format)
        tower_bytes = sum(
            math.prod(shape) * tower.config.dtype.itemsize
            for tower in self.towers.values()
            for shape in tower_shapes(tower)
        )
        return self.weight_bytes(weight_format) + table_bytes + tower_bytes

    def kv_bytes_per_token(self, cache_dtype: torch.dtype) -> int:
        """Bytes that one token takes in the caches of all layers."""
        cfg = self.config
        return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * cache_dtype.itemsize

    @property
    def _read_params(self) -> list[Param]:
        """All parameters without the table, or with the table as the head that it is."""
        outer, *layers = self.declared
        table = outer.pop("embed_VD")
        if self.config.tied_embeddings:
            outer["head_VD"] = table._replace(kind="linear")
        return [param for group in (outer, *layers) for param in group.values()]

    def _num_bytes(self, param: Param, weight_format: str) -> int:
        stored = FORMATS[weight_format if param.kind == "linear" else PLAIN]
        return stored.num_bytes(param.local(self.config.num_ranks).shape, self.config.dtype)


def tower_shapes(tower: Any) -> list[tuple[int, ...]]:
    """The shapes of all parameters of a tower, in the order of computation."""
    found: list[tuple[int, ...]] = []

    def note(param: Param) -> Any:
        found.append(param.shape)

    tower.build(note)
    return found
