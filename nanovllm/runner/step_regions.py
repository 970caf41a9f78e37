"""The regions of a step. Each is traced and compiled separately, once per bucket.

R rows | T tokens | D hidden | V vocabulary | M positions | H head size
L layers | P numbers of a layer's own inputs
W columns of this rank's logits: V, or its part on several ranks (`columns.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.models.config import ModelConfig
from nanovllm.models.experts import offloaded
from nanovllm.models.experts.offloaded import Offloaded
from nanovllm.models.formats import Weight
from nanovllm.models.lora.regions import Adapted, AdaptedTable
from nanovllm.models.model import (
    AdapterRows,
    Batch,
    Kept,
    LayerCall,
    Model,
    PagedCache,
    Params,
    cache_of,
    states_of,
)
from nanovllm.platforms.attention import Attention
from nanovllm.runner.mm_embeds import MMEmbeds, add_features
from nanovllm.runner.proposer import Drafting
from nanovllm.runner.state import (
    DeviceState,
    Span,
    SpanTokens,
    StatePlaces,
    decode_batch,
    decode_states,
    span_batch,
    span_states,
)

# Inputs of regions that are weights or tables (see `Compiler.frozen`).
FROZEN = (
    "params", "w", "tower_weights", "embed_VD", "final_norm_D", "head_VD", "cos_sin_MH", "tables",
)  # fmt: skip


class Table(NamedTuple):
    """A rotary table. Its name among a program's inputs ends like that of the first one."""

    cos_sin_MH: Tensor


# Regions are functions: in eager mode the compiler keeps them, and methods would keep the weights.


def _begin(
    embed: Callable[..., Tensor],
    cfg: ModelConfig,
    block_size: int,
    places: StatePlaces,
    state: DeviceState,
    embed_VD: Tensor,
    row_idx_R: Tensor,
) -> tuple[Tensor, Batch]:
    token_R, batch = decode_batch(block_size, state, row_idx_R)
    if places.num:
        batch = batch._replace(states=decode_states(places.num, state, row_idx_R))
    return _embedded(embed, cfg, embed_VD, token_R, batch), batch


def _begin_span(
    embed: Callable[..., Tensor],
    cfg: ModelConfig,
    place: Callable[..., tuple[SpanTokens, Batch]],
    places: StatePlaces,
    state: DeviceState,
    embed_VD: Tensor,
    span: Span,
) -> tuple[Tensor, SpanTokens, Batch]:
    tokens, batch = place(state, span)
    if places.num:
        batch = batch._replace(states=span_states(places, state, span, tokens))
    return _embedded(embed, cfg, embed_VD, tokens.token_T, batch), tokens, batch


def _embedded(
    embed: Callable[..., Tensor], cfg: ModelConfig, embed_VD: Weight, token_T: Tensor, batch: Batch
) -> Tensor:
    """The embeddings of tokens, with their adapters if the table has slots."""
    adapters = (batch.adapters,) if isinstance(embed_VD, AdaptedTable) else ()
    return embed(cfg, embed_VD, token_T, *adapters)


@dataclass(frozen=True, eq=False)
class StepRegions:
    """What the steps of one model are built from. Programs are built on first use.

    `other_tables` are the rotary tables of `ModelConfig.other_ropes`. `drafting` proposes tokens
    after each step.
    """

    model: Model
    attention: Attention
    params: Params
    caches: tuple[Kept, ...]
    cos_sin_MH: Tensor
    state: DeviceState
    compiler: Compiler
    predicts: bool = False  # see `LayerCall`
    other_tables: tuple[Table, ...] = ()
    drafting: Drafting | None = None

    @property
    def pages(self) -> PagedCache:
        """The cache of one layer: those of all layers with pages have its shape."""
        found = map(cache_of, self.caches)
        return next(one for one in found if one is not None)

    @property
    def block_size(self) -> int:
        return self.pages.shape_CB[1]

    def places(self, *, verifies: bool = False) -> StatePlaces:
        """The places of rows' states, in a step that perhaps `verifies` proposals."""
        kept = next(filter(None, map(states_of, self.caches)), None)
        if kept is None:
            return StatePlaces()
        return StatePlaces(kept[0].shape[0] // self.state.pos_S.shape[0], verifies)

    @property
    def _own_state(self) -> DeviceState:
        """The state without the rows' adapters, which few programs read."""
        return self.state._replace(adapter_S=None)

    @property
    def _of_slots(self) -> tuple[str, ...]:
        """A part of the keys of programs that read the rows' adapters."""
        return () if self.state.adapter_S is None else ("lora",)

    def begin(self, row_idx_R: Tensor) -> tuple[Tensor, Batch]:
        """The embedded tokens of rows, and their batch."""
        begun: tuple[Tensor, Batch] = self._run(
            "begin",
            (row_idx_R.shape[0], *self._of_slots),
            partial(_begin, self.model.embed, self.model.config, self.block_size, self.places()),
            state=self.state,
            embed_VD=self.params.embed_VD,
            row_idx_R=row_idx_R,
        )
        return begun

    def begin_span(
        self, span: Span, *, verifies: bool, each: bool = False
    ) -> tuple[Tensor, SpanTokens, Batch]:
        places, cfg = self.places(verifies=verifies), self.model.config
        place = partial(span_batch, self.block_size, each=each)
        key = (span.token_T.shape[0], span.row_idx_R.shape[0], *self._of_slots)
        return self._run(
            "begin",
            (*key, "each") if places.each or each else key,
            partial(_begin_span, self.model.embed, cfg, place, places),
            state=self.state,
            embed_VD=self.params.embed_VD,
            span=span,
        )

    def _with_layer_inputs(self, batch: Batch, h_TD: Tensor, token_T: Tensor) -> Batch:
        """The batch with the inputs of each layer, which are made of tokens and of the hidden state
        before the first one, if the model has any."""
        if self.model.layer_inputs is None:
            return batch
        inputs_LTP = self._run(
            "layer_inputs",
            (len(h_TD),),
            partial(self.model.layer_inputs, self.model.config),
            w=self.params.extra,
            token_T=token_T,
            h_TD=h_TD,
        )
        return batch._replace(inputs_LTP=inputs_LTP)

    def _of_given(
        self, name: str, function: Callable[..., Any], h_TD: Tensor, **inputs: object
    ) -> Any:
        """Run a region of steps with given embeddings: as a program for models that take images or
        audio, and otherwise op by op, since such steps are rare."""
        inputs["h_TD"] = h_TD
        if self.compiler.lowering is None or not self.model.takes_embeddings:
            return function(*inputs.values())
        return self._run(name, (len(h_TD),), function, **inputs)

    def _layers(
        self,
        phase: str,
        h_TD: Tensor,
        batch: Batch,
        max_q_len: int,
        last_R: Tensor | None = None,
        given: MMEmbeds | None = None,
    ) -> Tensor:
        sizes = (batch.slot_T.shape[0], batch.seq_len_R.shape[0])
        ahead = () if batch.end_T is None else ("ahead",)
        programs = self.model.layer_programs(keeps_last=last_R is not None)
        streamed = self._streamed(len(h_TD), last_R)
        groups = self._layer_groups()
        per_layer = zip(programs, self.params.layers, self.caches, streamed, self._layer_tables())
        for layer_idx, ((name, kind), weights, cache, upcoming, table_MH) in enumerate(per_layer):
            own = batch.of_layer(groups[layer_idx], layer_idx)
            if name != "last_layer":
                own = own._replace(kept_adapters=None)
            for stored in upcoming:
                self._run("stream", (), offloaded.stream, stored=stored)
            key = self.attention.key(max_q_len, sizes[0])
            call = LayerCall(key, kind, max_q_len, self.predicts)
            h_TD = self._run(
                name,
                (phase, *sizes, kind.name, *ahead, *self._of_slots),
                partial(self.model.layer, self.model.config, call),
                w=weights,
                kv=cache,
                cos_sin_MH=table_MH,
                batch=own._replace(keep_R=last_R) if name == "last_layer" else own,
                h_TD=h_TD,
            )
            if self.drafting is not None:
                self.drafting.keep(layer_idx, h_TD)
            # the last layer of a reduced model may be one after which the whole one adds features
            adds = given is not None and layer_idx + 1 < len(given.embeds_LTD)
            if adds and name != "last_layer":
                assert given is not None
                h_TD = self._of_given(
                    "add_features",
                    add_features,
                    h_TD,
                    is_given_T=given.is_given_T,
                    features_TD=given.embeds_LTD.select(0, layer_idx + 1),
                )
        return h_TD

    def _layer_groups(self) -> list[int]:
        """The group of each layer, whose block table it uses."""
        num_layers = len(self.caches)
        if len(self.state.block_tables) == 1:
            return [0] * num_layers
        places = self.model.page_groups.places(num_layers)
        return [0 if place is None else place[0] for place in places]

    def _layer_tables(self) -> list[Tensor]:
        """The rotary table of each layer."""
        tables = [self.cos_sin_MH, *(table.cos_sin_MH for table in self.other_tables)]
        layer_ropes = self.model.layer_ropes or (0,) * len(self.params.layers)
        return [tables[rope] for rope in layer_ropes]

    def _streamed(self, num_tokens: int, last_R: Tensor | None) -> list[list[Offloaded]]:
        """For each layer, the experts whose copy to the device starts before it."""
        layers, moe = self.params.layers, self.model.config.moe
        if moe is None:
            return [[] for _ in layers]
        num_pairs = [num_tokens * moe.top_k] * len(layers)
        if last_R is not None:
            num_pairs[-1] = len(last_R) * moe.top_k
        stored = [getattr(layer, "experts", None) for layer in layers]
        return offloaded.streamed_before(stored, num_pairs)

    def _head(self, h_RD: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        is_adapted = isinstance(self.params.head_VD, Adapted)
        return self._run(
            "head",
            (h_RD.shape[0], *(("lora",) * is_adapted)),
            partial(self.model.head, self.model.config),
            final_norm_D=self.params.final_norm_D,
            head_VD=self.params.head_VD,
            h_RD=h_RD,
            **({"adapters": adapters} if is_adapted else {}),
        )

    def _run(
        self, name: str, key: tuple[object, ...], function: Callable[..., Any], **inputs: object
    ) -> Any:
        return self.compiler.program(name, key, function, inputs)(*inputs.values())
