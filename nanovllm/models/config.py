"""What a dense decoder-only model is, as far as graphs, cache and loader need to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class ModelConfig:
    """Frozen description of one checkpoint's architecture.

    `layer_windows` holds, per layer, how many newest positions a query sees (itself included); 0 means all of them.
    `inv_freq` and `rope_scale` define the rotary table: angle(m, j) = m · inv_freq[j], cos and sin times `rope_scale`.
    `attention_backend` is a key of `ops.ATTENTION`: "" for the device's own kernels.
    `kv_dtype` is what the cache holds, None for `dtype`.
    Regions may read GRAPH_FIELDS alone: those are in the keys of compiled programs, beside the shapes of all inputs.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "norm_eps",
        "attention_backend",
    )

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
    layer_windows: tuple[int, ...]
    tied_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: torch.dtype = torch.float32
    attention_backend: str = ""
    kv_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is no multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim > 256 or self.head_dim % 8:
            raise ValueError(
                f"head_dim {self.head_dim} is not supported: it must be a multiple of 8, at most 256"
            )
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"{len(self.layer_windows)} layer windows for {self.num_layers} layers"
            )

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.cache_dtype.itemsize

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes that one decode step must read: every weight once, the embedding table not at all unless it is the head."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        mlp = 3 * self.hidden_size * self.ffn_size
        return (
            self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size
        ) * self.dtype.itemsize


def dense_config(
    hf: Any, *, architecture: str, dtype: torch.dtype, max_model_len: int | None, **differences: Any
) -> ModelConfig:
    """The fields that every dense architecture takes from its Hugging Face config in the same way.

    `differences` are the fields in which an architecture departs from a plain Llama. Raises ValueError for what the
    config asks and this engine does not do.
    """
    from nanovllm.models.rope import extends_itself, rotary_frequencies

    if getattr(hf, "hidden_act", "silu") != "silu":
        raise ValueError(
            f"hidden_act {hf.hidden_act!r} is not supported by {architecture}: only 'silu' is"
        )
    if getattr(hf, "quantization_config", None):
        raise ValueError(f"quantized checkpoints are not supported: {hf.quantization_config}")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if (
        max_model_len is not None
        and max_model_len > hf.max_position_embeddings
        and not extends_itself(hf)
    ):
        raise ValueError(
            f"max_model_len is {max_model_len}, but the checkpoint has {hf.max_position_embeddings} positions "
            "(max_position_embeddings)"
        )
    inv_freq, rope_scale = rotary_frequencies(
        hf, head_dim, max_model_len or hf.max_position_embeddings
    )
    fields: dict[str, Any] = {
        "layer_windows": (0,) * hf.num_hidden_layers,
        "num_kv_heads": getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        **differences,
    }
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        head_dim=head_dim,
        norm_eps=hf.rms_norm_eps,
        max_position=hf.max_position_embeddings,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        tied_embeddings=bool(hf.tie_word_embeddings),
        dtype=dtype,
        **fields,
    )


def windows_by_layer_type(hf: Any) -> tuple[int, ...]:
    """Per-layer windows of configs that name each layer "full_attention" or "sliding_attention"."""
    layer_types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"layer types {sorted(unknown)} are not supported: only full_attention and sliding_attention are"
        )
    return tuple(
        hf.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in layer_types
    )
