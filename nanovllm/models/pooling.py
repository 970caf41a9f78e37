"""Models that pool: one vector of numbers for a whole sequence, in place of the next token.

A decoder becomes one by `of_decoder`, which replaces its head. An encoder declares its `Pooler`
itself.

T tokens | R rows (sequences) | D hidden | V vocabulary | C labels | O numbers of a result
X rows of hidden states: R if the last layer dropped the others, else T
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, gemma3
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Model, Param
from nanovllm.models.param import Times

Pooling = Literal["last", "cls", "mean"]
RMS_HEADS = (dense.head, gemma3.head)  # regions that begin with an RMS norm
PREFIX = "model."  # of a decoder's tensors, which a checkpoint without a head may leave out


class PoolInputs(NamedTuple):
    """The inputs of a step: whole sequences, one after another, then padding.

    Padding tokens have id and position 0 and belong to no row; rows of padding are empty.
    """

    token_T: Tensor
    pos_T: Tensor  # of each token in its sequence
    start_S: Tensor  # int32: row r owns tokens start[r] .. start[r + 1] − 1, S = R + 1
    chosen_R: Tensor  # the token whose state is the row's result
    type_T: Tensor | None = None  # 1 for tokens of the second of two texts
    # of decoders: the place of each token's key and value, and the first block of each row
    slot_T: Tensor | None = None
    block_R: Tensor | None = None  # int32


class PoolWeights(NamedTuple):
    """All weights of a model that pools. `outer` is the `Pooler.outer_type`, `layers` are the
    architecture's own named tuples."""

    outer: Any
    layers: tuple[Any, ...]
    # those of `Params`
    tower: Any = None
    audio_tower: Any = None


@dataclass(frozen=True)
class Pooler:
    """How a model pools: the regions around its layers.

    `embed(config, outer, inputs)` gives the hidden states [T, D]; `norm(config, outer, h_XD)` what
    follows the last layer, token by token; `head(config, outer, x_RD)` the results [R, O] of pooled
    states. `pooling` is "last" or "cls" for the state of the last or first token, "mean" for the
    mean of all. `outer_type` is a named tuple, whose fields `Model.outer_params` declares.
    `size` is O. An encoder is not causal: its layers get no memory for keys and values. With
    `has_types` tokens have types. The names of tensors begin with `prefix`, or, in a checkpoint
    without a head, all lack it. `num_labels` tokens have logits if the head is a vocabulary's.
    `scored(model, num)` gives an encoder the checkpoint's head of `num` classes.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "pooling", "embed", "norm", "head", "size", "is_causal", "has_types", "num_labels",
    )  # fmt: skip

    pooling: Pooling
    embed: Callable[..., Tensor]
    norm: Callable[..., Tensor]
    head: Callable[..., Tensor]
    outer_type: type[Any]
    size: int
    is_causal: bool = True
    has_types: bool = False
    prefix: str = PREFIX
    num_labels: int = 0
    scored: Callable[[Model, int], Model] | None = None


class DecoderOuter(NamedTuple):
    """What a decoder that pools has outside its layers."""

    embed_VD: Weight
    final_norm_D: Tensor
    head_VD: Weight | None = None  # of the logits of labels
    label_C: Tensor | None = None  # their token ids, int64
    score_CD: Weight | None = None  # of a classification head
    score_bias_C: Tensor | None = None
    inner_DD: Weight | None = None  # of a reward model: the layer before it
    inner_bias_D: Tensor | None = None


# regions -----------------------------------------------------------------------------------------


def pool(
    cfg: ModelConfig,
    pooling: str,
    norm: Callable[..., Tensor],
    head: Callable[..., Tensor],
    params: Any,
    inputs: PoolInputs,
    h_XD: Tensor,
) -> Tensor:
    """The results [R, O] in fp32. With pooling "mean" h_XD has all tokens, else the chosen ones."""
    x_XD = norm(cfg, params, h_XD)
    if pooling == "mean":
        x_XD = mean(x_XD, inputs.start_S).to(x_XD.dtype)
    return head(cfg, params, x_XD).float()


def mean(x_TD: Tensor, start_S: Tensor) -> Tensor:
    """The mean of each row's tokens [R, D] in fp32; zeros for empty rows. A product with a matrix
    of ones and zeros: its sums have one order."""
    token_T = torch.arange(x_TD.shape[0], device=x_TD.device, dtype=torch.int32)
    start_R1, end_R1 = start_S[:-1, None], start_S[1:, None]
    owned_RT = (token_T >= start_R1) & (token_T < end_R1)
    count_R1 = (end_R1 - start_R1).clamp(min=1)
    return owned_RT.float() @ x_TD.float() / count_R1


def embed_tokens(
    embed: Callable[..., Tensor], cfg: ModelConfig, params: Any, inputs: PoolInputs
) -> Tensor:
    """A decoder's embeddings."""
    return embed(cfg, params.embed_VD, inputs.token_T)


def rms_norm(cfg: ModelConfig, params: DecoderOuter, h_XD: Tensor) -> Tensor:
    return ops.rms_norm(h_XD, params.final_norm_D, cfg.norm_eps)


def no_norm(cfg: ModelConfig, params: Any, h_XD: Tensor) -> Tensor:
    """Of models whose head, or whose last layer, has the norm."""
    return h_XD


def no_head(cfg: ModelConfig, params: Any, x_RD: Tensor) -> Tensor:
    """Of embeddings: the pooled state itself."""
    return x_RD


def score(cfg: ModelConfig, params: DecoderOuter, x_RD: Tensor) -> Tensor:
    """Logits of a classification head."""
    assert params.score_CD is not None
    return linear(x_RD, params.score_CD, params.score_bias_C)


def reward(cfg: ModelConfig, params: DecoderOuter, x_RD: Tensor) -> Tensor:
    """Logits of a head with one inner layer."""
    assert params.inner_DD is not None and params.score_CD is not None
    inner_RD = torch.relu(linear(x_RD, params.inner_DD, params.inner_bias_D))
    return linear(inner_RD, params.score_CD, params.score_bias_C)


def label_logits(
    head: Callable[..., Tensor], cfg: ModelConfig, params: DecoderOuter, h_RD: Tensor
) -> Tensor:
    """The logits of label tokens. Of two, what the second has more than the first: the sigmoid of
    that is the second's share of both."""
    table_VD = params.embed_VD if params.head_VD is None else params.head_VD
    assert isinstance(table_VD, Tensor) and params.label_C is not None
    rows_CD = dense.embed(cfg, table_VD, params.label_C)
    logits_RC = head(cfg, params.final_norm_D, rows_CD, h_RD).float()
    return logits_RC[:, 1:] - logits_RC[:, :1] if rows_CD.shape[0] == 2 else logits_RC


# decoders ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outer:
    """The declaration of a decoder's outer parameters, with those of its head in place of the
    vocabulary's."""

    declare: Callable[[ModelConfig], dict[str, Param]]
    head: tuple[tuple[str, Param], ...] = ()
    keeps_head: bool = False

    def __call__(self, cfg: ModelConfig) -> dict[str, Param]:
        declared = self.declare(cfg)
        if not self.keeps_head:
            declared.pop("head_VD", None)
        return declared | dict(self.head)


@dataclass(frozen=True)
class Renamed:
    """Declared parameters whose tensors have no prefix in the checkpoint."""

    declare: Callable[..., dict[str, Param]]
    prefix: str

    def __call__(self, *args: Any) -> dict[str, Param]:
        def bare(name: str) -> str:
            return name.removeprefix(self.prefix)

        return {
            field: param._replace(
                sources=tuple(map(bare, param.sources)),
                other_name=None if param.other_name is None else bare(param.other_name),
            )
            for field, param in self.declare(*args).items()
        }


def without_prefix(model: Model, prefix: str) -> Model:
    """The model of a checkpoint whose tensors' names lack this prefix."""
    return replace(
        model,
        outer_params=Renamed(model.outer_params, prefix),
        layer_params=Renamed(model.layer_params, prefix),
    )


def of_decoder(
    model: Model, *, num_scores: int = 0, num_labels: int = 0, inner: bool = False
) -> Model:
    """A decoder that pools: for embeddings, with the logits of `num_scores` classes, perhaps by a
    head with an `inner` layer, or with those of `num_labels` tokens.

    A model that sees keeps its vision tower. Raises ValueError for a decoder that needs a cache of
    another kind than keys and values, and for embeddings of one whose last norm is not an RMS norm.
    """
    cfg = model.config
    _check(model)
    heads: tuple[tuple[str, Param], ...] = ()
    norm: Callable[..., Tensor]
    head: Callable[..., Tensor]
    if num_labels:
        norm, head = no_norm, partial(label_logits, model.head)
    else:
        _check_norm(model)
        norm, head = rms_norm, score if num_scores else no_head
    if num_scores:
        heads = tuple(_score_params(cfg.hidden_size, num_scores, inner=inner).items())
        head = reward if inner else score
    has_own_head = bool(num_labels) and not cfg.tied_embeddings
    pooler = Pooler(
        pooling="last",
        embed=partial(embed_tokens, model.embed),
        norm=norm,
        head=head,
        outer_type=DecoderOuter,
        size=num_scores or (1 if num_labels == 2 else num_labels) or cfg.hidden_size,
        num_labels=num_labels,
    )
    return replace(
        model,
        config=replace(cfg, tied_embeddings=False),
        outer_params=_Outer(model.outer_params, heads, has_own_head),
        pooler=pooler,
        read_elsewhere=(*model.read_elsewhere, "lm_head.", "score."),
    )


def _score_params(hidden: int, num: int, *, inner: bool) -> dict[str, Param]:
    if not inner:
        return {"score_CD": Param.one("plain", "score.weight", num, hidden)}
    return {
        "inner_DD": Param.one("plain", "score.0.weight", hidden, hidden),
        "inner_bias_D": Param.one("bias", "score.0.bias", hidden),
        "score_CD": Param.one("plain", "score.2.weight", num, hidden),
        "score_bias_C": Param.one("bias", "score.2.bias", num),
    }


def _check(model: Model) -> None:
    name = model.config.architecture
    if not all(isinstance(one, PagedKV) for one in model.kept):
        raise ValueError(
            f"{name} does not pool: layers with latents or recurrent states are not supported"
        )
    if any(kind.has_sinks for kind in model.layer_kinds):
        raise ValueError(f"{name} does not pool: attention with sinks is not supported")
    if model.audio_tower is not None:
        raise ValueError(f"{name} does not pool: models of sound are not supported")
    if model.layer_inputs is not None:
        raise ValueError(f"{name} does not pool: layers with inputs of their own are not supported")


def _check_norm(model: Model) -> None:
    adapt = model.outer_params(model.config)["final_norm_D"].adapt
    if model.head not in RMS_HEADS or isinstance(adapt, Times):
        raise ValueError(
            f"{model.config.architecture} does not pool: its last norm is not a plain RMS norm"
        )
