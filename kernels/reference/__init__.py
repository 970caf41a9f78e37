"""The meaning of every op in plain torch.

These files are the specification: kernels are tested against it, and it runs where no kernel does.

Shapes: T tokens | R rows (requests) | P blocks per row | C blocks in the cache | B tokens per block
D hidden | O outputs | N query heads | K key-value heads | H head size | E = (N + 2K)·H | F ffn size
M positions in the rotary table | V vocabulary | F sampling fields (in the ops of a step)
S rows of the device state, the last one for padding
Mixture of experts: E experts | X experts, with those elsewhere | K experts per token
F expert width | G = 2F

A cache in float8_e4m3fn holds x / scale. Each key-value head has one fp32 scale for keys and one
for values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanovllm.kernels.reference import (
    attention,
    clamped,
    drafts,
    experts,
    gated_delta,
    ggml,
    latent_attention,
    linear,
    lora,
    norm_act,
    offload,
    ordered,
    packed,
    rope_store,
    sample,
    ssd,
    step,
)

__all__ = [
    "attention",
    "clamped",
    "drafts",
    "experts",
    "gated_delta",
    "ggml",
    "latent_attention",
    "linear",
    "lora",
    "meaning",
    "norm_act",
    "offload",
    "ordered",
    "packed",
    "rope_store",
    "sample",
    "ssd",
    "step",
]


# those with ops that a compiler can trace
TOPICS = (
    attention, clamped, drafts, experts, gated_delta, ggml, latent_attention, linear, lora,
    norm_act, ordered, packed, rope_store, sample, ssd, step,
)  # fmt: skip


def meaning(name: str) -> Callable[..., Any]:
    """The meaning of an op, if a compiler can trace it: not of ops of `offload`, which read the
    routing on the host. Raises KeyError for other names."""
    for topic in TOPICS:
        if name in vars(topic):
            found: Callable[..., Any] = vars(topic)[name]
            return found
    raise KeyError(f"{name} has no meaning in plain torch that can replace it")
