"""What encoders have in common: attention in both directions within a sequence, and their config.

T tokens | D hidden | N heads | H head size | E = 3·N·H | C labels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.config import ModelConfig
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCall, LayerKind
from nanovllm.models.param import Param

# transformers' names of activations, and which function each is
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """The config of an encoder. `norm_eps` is that of its layer norms. Its first position has the
    number `first_position` in the table of positions, if there is one."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        *ModelConfig.GRAPH_FIELDS, "activation", "first_position",
    )  # fmt: skip

    activation: str = "gelu"
    first_position: int = 0


def encoder_config(
    hf: Any,
    *,
    architecture: str,
    dtype: torch.dtype,
    max_model_len: int | None,
    activation: str,
    norm_eps: float,
    first_position: int = 0,
    **differences: Any,
) -> EncoderConfig:
    """The config of an encoder, from transformers' config. Raises ValueError for settings that are
    not supported."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"the activation {activation!r} is not supported by {architecture}: use one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(hf, name, False):
            raise ValueError(f"{name} True is not supported by {architecture}")
    longest = hf.max_position_embeddings - first_position
    fields: dict[str, Any] = {"inv_freq": (), "rope_scale": 1.0, **differences}
    return EncoderConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=hf.hidden_size // hf.num_attention_heads,
        norm_eps=norm_eps,
        max_position=min(max_model_len or longest, longest),
        tied_embeddings=False,
        dtype=dtype,
        activation=ACTIVATIONS[activation],
        first_position=first_position,
        **fields,
    )


def encoder_kind(cfg: EncoderConfig, name: str, window: int = 0) -> LayerKind:
    """A kind of layers. With a window a token sees itself and window − 1 tokens on each side."""
    return LayerKind(name, PagedKV(cfg.num_heads, cfg.head_dim, cfg.head_dim, window))


def attend(
    cfg: EncoderConfig, call: LayerCall, batch: Batch, qkv: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Attention of queries, keys and values [T, N, H] in both directions: [T, N · H]."""
    side = call.kind.window - 1 if call.kind.window else -1
    o_TNH: Tensor = ops.segment_attention(
        *qkv, batch.q_start_S, call.max_q_len, cfg.head_dim**-0.5, side, side
    )
    return o_TNH.flatten(1)


def activated(cfg: EncoderConfig, x: Tensor) -> Tensor:
    """The config's activation, element by element."""
    if cfg.activation == "relu":
        return torch.relu(x)
    approximate = "tanh" if cfg.activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


def linear_params(field: str, dims: str, source: str, rows: int, depth: int) -> dict[str, Param]:
    """A linear layer with a bias: `field` and the letters of its shape name the fields."""
    return {
        f"{field}_{dims}": Param.one("linear", f"{source}.weight", rows, depth),
        f"{field}_bias_{dims[0]}": Param.one("bias", f"{source}.bias", rows),
    }


def norm_params(field: str, source: str, size: int) -> dict[str, Param]:
    """A layer norm with a bias. The first checkpoints of BERT have the names of TensorFlow's."""
    weight = Param.one("norm", f"{source}.weight", size)
    bias = Param.one("bias", f"{source}.bias", size)
    return {
        f"{field}_D": weight._replace(other_name=f"{source}.gamma"),
        f"{field}_bias_D": bias._replace(other_name=f"{source}.beta"),
    }
