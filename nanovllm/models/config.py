"""The sizes of a decoder-only model for regions, cache and loader."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

if TYPE_CHECKING:
    from nanovllm.models.group_router import GroupRouter

MAX_POSITION = 1 << 28  # tables have a row for each
SIZES = (
    "vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
)  # fmt: skip


# Fields of configs for other routers, and the values that mean a softmax of all scores. No region
# computes anything else.
ROUTER_FIELDS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("scoring_func", "score_func", "score_function"), ("softmax",)),
    "moe_router_activation_func": ("softmax",),
    "topk_method": ("greedy",),
    **dict.fromkeys(("n_group", "n_groups", "topk_group", "num_expert_group"), (1, 0)),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), (1,)),
    **dict.fromkeys(("use_expert_bias", "use_routing_bias", "router_bias"), (False,)),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_logit_softcapping": (0,),
    "moe_apply_router_weight_on_input": (False,),
}


@dataclass(frozen=True)
class Compression:
    """Experts are stored as products with shared bases of `rank` columns, in `dtype`."""

    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class MoeConfig:
    """The experts of a sparse layer.

    A token goes to `top_k` of `num_experts` experts of width `expert_size`. With `normalize` the
    weights of its experts sum to 1. `shared_size` is the width of the shared expert, 0 without one.
    Without a `router` the softmax of all scores chooses. `activation` is that of the experts' gate,
    "silu" or another which the architecture computes itself.
    `compression` is None for uncompressed experts. With `is_expert_parallel` each of several ranks
    has whole experts, otherwise a part of every expert. Raises ValueError for sizes that do not fit
    together.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = ("top_k", "normalize", "router")

    num_experts: int
    top_k: int
    expert_size: int
    normalize: bool
    shared_size: int = 0
    compression: Compression | None = None
    is_expert_parallel: bool = False
    router: GroupRouter | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        sizes = {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "the experts' intermediate size": self.expert_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.shared_size < 0:
            raise ValueError(f"shared_size is {self.shared_size}: it must be at least 0")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.top_k}, but there are {self.num_experts} experts"
            )

        if self.router is not None:
            self.router.check(self.num_experts, self.top_k)

    def distinct_experts(self, num_tokens: float) -> float:
        """The mean number of distinct experts of a layer that `num_tokens` tokens choose.

        Assumes even routing: a token chooses each expert with probability K / E, and tokens choose
        independently.
        """
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)


class Rope(NamedTuple):
    """A rotary table: angle(m, j) = m · inv_freq[j]; cos and sin are multiplied by `scale`.

    Elements of a head beyond the frequencies are not rotated.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Frozen description of one checkpoint's architecture.

    `max_position` is the longest sequence, prompt and answer together. `inv_freq` and `rope_scale`
    are the fields of the first `Rope`, `other_ropes` those that some layers have instead
    (`Model.layer_ropes`). With `rope_axes` a token has three positions, in time, height and width,
    and frequency j turns by number rope_axes[j] of them. Embeddings of requests may include
    features that are added to hidden states after each of the first `num_deepstack` layers. With
    `sees_ahead` the tokens of an image, or of other given embeddings, see all of them: those after
    themselves too.
    `ffn_size` is the width of dense layers, `moe` describes sparse ones. On one of `num_ranks`
    ranks, the numbers of heads are this rank's, and all other sizes are the model's
    (`Model.on_ranks`). Raises ValueError for head sizes that the kernels do not take.

    Regions may read GRAPH_FIELDS only. These and the shapes of all inputs are in the keys of
    compiled programs.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "vocab_size", "num_heads", "num_kv_heads", "head_dim", "norm_eps", "moe", "num_ranks",
        "dtype",
    )  # fmt: skip

    MAX_HEAD: ClassVar[int] = 256  # numbers of a head

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    inv_freq: tuple[float, ...]
    rope_scale: float
    tied_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoeConfig | None = None
    rope_axes: tuple[int, ...] = ()
    num_deepstack: int = 0
    sees_ahead: bool = False
    dtype: torch.dtype = torch.float32
    num_ranks: int = 1
    other_ropes: tuple[Rope, ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.max_position <= MAX_POSITION:
            raise ValueError(
                f"the longest sequence has {self.max_position} tokens: it must have at most "
                f"{MAX_POSITION}: set max_model_len"
            )
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps is {self.norm_eps}: it must be a finite number, from 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}"
            )
        if self.rope_axes and len(self.rope_axes) != len(self.inv_freq):
            raise ValueError(
                f"mrope_section has {len(self.rope_axes)} frequencies, but a head has "
                f"{len(self.inv_freq)}"
            )
        if self.head_dim > self.MAX_HEAD or self.head_dim % 8:
            raise ValueError(
                f"head_dim {self.head_dim} is not supported: it must be a multiple of 8, up to "
                f"{self.MAX_HEAD}"
            )

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return (Rope(self.inv_freq, self.rope_scale), *self.other_ropes)

    @property
    def largest_rope_scale(self) -> float:
        """The largest factor of a table on a key's length."""
        half = self.head_dim // 2
        partial = any(len(rope.inv_freq) < half for rope in self.ropes)
        return max(*(rope.scale for rope in self.ropes), 1.0 if partial else 0.0)

    def with_attention_scale(self, scale: float) -> ModelConfig:
        """The config of a model that multiplies products of queries and keys by `scale`.

        Attention multiplies them by 1 / √H. The rotary tables include the rest: its root multiplies
        both queries and keys.
        """
        half = self.head_dim // 2
        assert all(len(rope.inv_freq) == half for rope in self.ropes)
        factor = math.sqrt(scale * math.sqrt(self.head_dim))
        first, *others = (Rope(rope.inv_freq, rope.scale * factor) for rope in self.ropes)
        return replace(self, rope_scale=first.scale, other_ropes=tuple(others))


def dense_config(
    hf: Any,
    *,
    architecture: str,
    dtype: torch.dtype,
    max_model_len: int | None,
    partial_rotary: bool = False,
    hidden_act: str = "silu",
    **differences: Any,
) -> ModelConfig:
    """The config of a dense architecture, from transformers' config.

    `differences` are the fields in which the architecture departs from a plain Llama. With
    `partial_rotary` it may rotate a part of each head; `inv_freq` has the frequencies of this part.
    `hidden_act` is the only activation that its regions compute.
    A `max_model_len` above what the checkpoint allows is lowered (`rope.sequence_length`). Raises
    ValueError for settings that this engine does not support.
    """
    from nanovllm.models.rope import rotary_frequencies, sequence_length

    _refuse(hf, architecture, hidden_act)
    moe: MoeConfig | None = differences.get("moe")
    if moe is not None:
        _refuse_routers(hf, architecture, moe.router)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    max_position = sequence_length(hf, max_model_len)
    inv_freq, rope_scale = rotary_frequencies(hf, head_dim, max_position, partial=partial_rotary)
    eps = {} if "norm_eps" in differences else {"norm_eps": hf.rms_norm_eps}
    fields: dict[str, Any] = {
        **eps,
        "num_kv_heads": getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        **differences,
    }
    if "ffn_size" not in fields:
        fields["ffn_size"] = hf.intermediate_size
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        head_dim=head_dim,
        max_position=max_position,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        tied_embeddings=bool(hf.tie_word_embeddings),
        dtype=dtype,
        **fields,
    )


def _refuse(hf: Any, architecture: str, hidden_act: str) -> None:
    """Raise ValueError for fields whose value changes results in a way that no region computes."""
    if getattr(hf, "is_heterogeneous", False) or vars(hf).get("per_layer_config"):
        raise ValueError("per_layer_config is not supported: all layers must have the same sizes")
    if getattr(hf, "hidden_act", hidden_act) != hidden_act:
        raise ValueError(
            f"hidden_act {hf.hidden_act!r} is not supported by {architecture}: only "
            f"{hidden_act!r} is"
        )
    if not getattr(hf, "is_causal", True):
        raise ValueError(f"is_causal {hf.is_causal} is not supported: only causal attention is")


def _refuse_routers(hf: Any, architecture: str, router: GroupRouter | None) -> None:
    """Raise ValueError for a router that is neither the model's own nor, without one, the softmax
    of all scores."""
    for name, allowed in (
        ROUTER_FIELDS if router is None else router.fields(ROUTER_FIELDS)
    ).items():
        value = getattr(hf, name, None)
        if value is not None and value not in allowed:
            scores = "the softmax of all their" if router is None else f"{router.scoring}"
            raise ValueError(
                f"{name} {value!r} is not supported by {architecture}: only {allowed[0]!r} is, "
                f"since experts are chosen by {scores} scores"
            )


def require_type(hf: Any, architecture: str, *model_types: str) -> None:
    """Raise ValueError unless the config's `model_type` is one of the architecture's own."""
    if hf.model_type not in model_types:
        raise ValueError(
            f"model_type {hf.model_type!r} does not go with the architecture {architecture}: "
            f"it must be {' or '.join(map(repr, model_types))}"
        )


def windows_by_layer_type(hf: Any) -> tuple[int, ...]:
    """Each layer's window, for configs that name layers "full_attention" or "sliding_attention"."""
    layer_types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"layer types {sorted(unknown)} are not supported: only full_attention and "
            "sliding_attention are"
        )
    windows = {"full_attention": 0, "sliding_attention": getattr(hf, "sliding_window", None) or 0}
    return tuple(windows[kind] for kind in layer_types)
