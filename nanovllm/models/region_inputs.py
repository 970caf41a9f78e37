"""What the regions of a model get: weights, static arguments, caches and states, the batch.

T tokens | R rows (requests) | S = R + 1 | P blocks per row | C cache blocks | B block size
D hidden | K kv heads | H head size | V vocabulary | Z numbers of a latent | X places of states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.models.formats import Weight
from nanovllm.models.layer_state import LayerState, pages_of


class Params(NamedTuple):
    """All weights. `layers` are the architecture's own named tuples.

    `head_VD` is `embed_VD` itself where the checkpoint ties them and both have one format.
    """

    embed_VD: Weight
    layers: tuple[Any, ...]
    final_norm_D: Tensor
    head_VD: Weight
    tower: Any = None  # `vision.vision_encoder.TowerWeights` of a model with a vision encoder
    audio_tower: Any = None  # `audio.audio_encoder.AudioWeights` of a model with an audio encoder
    draft: Any = None  # `Params` of a second model, which proposes tokens
    extra: Any = None  # of `Model.extra_type`, for models that have more outside their layers


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes the layers of one model: layers of one kind share their programs.

    Layers of one kind declare parameters of the same shapes, and keep the same between steps. A
    `sparse` layer has experts.
    """

    name: str  # in the names of programs
    keeps: LayerState
    sparse: bool = False
    has_sinks: bool = False  # of attention, see `reference.attention.paged_attention`

    @property
    def window(self) -> int:
        """`PagedKV.window`."""
        pages = pages_of(self.keeps)
        return 0 if pages is None else pages.window


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


class LayerCache(NamedTuple):
    """One layer's keys and values; with scales they are float8_e4m3fn and mean value · scale."""

    k_CBKH: Tensor
    v_CBKH: Tensor
    k_scale_K: Tensor | None = None
    v_scale_K: Tensor | None = None

    @property
    def shape_CB(self) -> tuple[int, int]:
        """The number of blocks, and that of tokens in each."""
        return self.k_CBKH.shape[0], self.k_CBKH.shape[1]


class LatentCache(NamedTuple):
    """One layer's latents: Z numbers of each token, which all heads share (`PagedLatent`)."""

    latent_CBZ: Tensor

    @property
    def shape_CB(self) -> tuple[int, int]:
        """The number of blocks, and that of tokens in each."""
        return self.latent_CBZ.shape[0], self.latent_CBZ.shape[1]


class CacheAndStates(NamedTuple):
    """What a layer with attention beside a recurrence keeps (`KVAndState`)."""

    cache: LayerCache
    states: tuple[Tensor, ...]


# What a layer keeps: its cache, or its `Recurrent.tensors` in order, [X, *shape] each (`States`).
PagedCache = LayerCache | LatentCache
Kept = PagedCache | CacheAndStates | tuple[Tensor, ...]


def cache_of(kept: Kept) -> PagedCache | None:
    """A layer's cache; None if it has none."""
    if isinstance(kept, CacheAndStates):
        return kept.cache
    return kept if isinstance(kept, LayerCache | LatentCache) else None


def states_of(kept: Kept) -> tuple[Tensor, ...]:
    """The tensors that a layer keeps of each row; empty if it keeps none."""
    if isinstance(kept, CacheAndStates):
        return kept.states
    return () if isinstance(kept, LayerCache | LatentCache) else kept


# Region inputs whose first dimension may vary between runs of one program: the number of cache
# blocks, and the number of positions in the rotary table.
VARYING = ("k_CBKH", "v_CBKH", "latent_CBZ", "cos_sin_MH")


class Pages(NamedTuple):
    """Where tokens are in the caches of one group of layers."""

    slot_T: Tensor
    block_table_RP: Tensor


class States(NamedTuple):
    """Where the states of recurrent layers are, by the first dimension of their tensors.

    A row's state after the token at position p is at place p % K of its K places, so a step that
    runs again, or whose last tokens are rejected, finds the state that it began with.
    """

    from_R: Tensor  # the state before each row's tokens of this step
    is_new_R: Tensor  # rows without earlier tokens: their state is zeros, whatever is stored
    to_R: Tensor | None  # where the state after each row's last token goes
    to_T: Tensor | None = None  # in place of that, where those after all tokens go


class AdapterRows(NamedTuple):
    """The adapter of each token: the number of its slot, from 1 on; 0 for none.

    `order_T` has the tokens of one adapter after each other, in `tile_T3`, both by
    `ops.adapter_tiles`.
    """

    adapter_T: Tensor
    order_T: Tensor
    tile_T3: Tensor


class Batch(NamedTuple):
    """The inputs that change between two steps of one bucket.

    A step has one for all layers; each layer gets that of its group (`of_group`).
    """

    rope_pos_T: Tensor  # rotation position of each token
    slot_T: Tensor  # cache slot that each token writes: block · B + offset
    block_table_RP: Tensor
    seq_len_R: Tensor  # tokens of each row, this step's included
    q_start_S: Tensor  # row r owns tokens q_start[r] .. q_start[r + 1] − 1
    keep_R: Tensor | None = None  # the only tokens for which a layer continues after attention
    adapters: AdapterRows | None = None  # of models with adapters
    kept_adapters: AdapterRows | None = None  # of a span: those of each row's last token
    others: tuple[Pages, ...] = ()  # those of groups 1, 2, … of layers
    states: States | None = None  # in models with recurrent layers
    end_T: Tensor | None = None  # `ops.paged_attention`, in steps whose tokens see later ones
    # in models whose layers have inputs of their own: those of all layers, and that of one
    inputs_LTP: Tensor | None = None
    input_TP: Tensor | None = None

    def of_group(self, group: int) -> Batch:
        """The inputs of the layers of one group."""
        pages = self.others[group - 1]._asdict() if group else {}
        return self._replace(**pages, others=())

    def of_layer(self, group: int, layer_idx: int) -> Batch:
        """The inputs of one layer of a group."""
        own = self.of_group(group)
        if self.inputs_LTP is None:
            return own
        return own._replace(inputs_LTP=None, input_TP=self.inputs_LTP.select(0, layer_idx))
