"""The interface of an audio encoder: its sizes, inputs, parameters and regions.

K chunks | F frames of mel features in a chunk | M mel bins | P = F / 2 positions of a chunk
T = K · P positions | G = T / 2: one placeholder token each | D hidden | N heads | H head size
E = 3D | U MLP width | O text model's hidden size | S = 2K + 1 starts of segments.

A clip is cut into chunks, and attention stays within a chunk. So the chunks of a clip may be
encoded in different calls, together with those of other clips. Only the last chunk of a clip is
shorter than F. Its padding is a separate segment, which yields no token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.models.model import Param

# The prefixes of a tower's tensors, in checkpoints of transformers 5 and in releases.
PREFIXES = ("model.audio_tower.", "audio_tower.")


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Frozen description of one checkpoint's tower. Raises ValueError for sizes that do not fit.

    `depth` blocks of `num_heads` heads take chunks of `chunk_frames` frames of `num_mels` numbers.
    Four frames make one token of `out_size` numbers.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "hidden_size", "num_heads", "chunk_frames", "norm_eps",
    )  # fmt: skip

    architecture: str
    depth: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    out_size: int
    num_mels: int
    chunk_frames: int
    norm_eps: float = 1e-5
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        sizes = {
            "encoder_layers": self.depth, "d_model": self.hidden_size,
            "encoder_attention_heads": self.num_heads, "encoder_ffn_dim": self.ffn_size,
            "output_dim": self.out_size, "num_mel_bins": self.num_mels,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} of the audio tower is {value}: it must be at least 1")
        if self.hidden_size % self.num_heads or self.head_dim % 8:
            raise ValueError(
                f"the audio tower's d_model {self.hidden_size} must be its {self.num_heads} heads "
                "times a multiple of 8"
            )
        if self.chunk_frames < 4 or self.chunk_frames % 4:
            raise ValueError(
                f"n_window of the audio tower is {self.chunk_frames // 2}: it must be even and at "
                "least 2, so that no token is made of two chunks"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_levels(self) -> int:
        return 1


class AudioOuter(NamedTuple):
    """The weights of a tower before its first block: two convolutions over 3 frames."""

    conv1_DM3: Tensor
    conv1_bias_D: Tensor
    conv2_DD3: Tensor
    conv2_bias_D: Tensor


class AudioMerger(NamedTuple):
    """The weights after the last block."""

    norm_D: Tensor
    norm_bias_D: Tensor
    out_OD: Tensor
    out_bias_O: Tensor


class AudioWeights(NamedTuple):
    """All weights of a tower. `blocks` are the architecture's own named tuples."""

    outer: AudioOuter
    blocks: tuple[Any, ...]
    merger: AudioMerger


@dataclass(frozen=True)
class AudioTower:
    """One checkpoint's tower: its config, and the functions of its regions.

    `embed(config, w, frames_K, mel_KFM)` gives the hidden state [T, D], where `frames_K` is the
    number of frames of each chunk; `block(config, w, start_S, h_TD)` gives the next one;
    `merge(config, w, h_TD)` gives the tokens [G, O] of all chunks, those of padding included. All
    are pure functions at the top of a module, and may read GRAPH_FIELDS only.

    `outer_params(config)`, `block_params(config, block_idx)` and `merger_params(config)` declare
    parameters by the fields of `AudioOuter`, `block_type` and `AudioMerger`. Sources are named
    without one of `prefixes`. `unused` are the beginnings of tensors that no region reads.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = ("config", "embed", "block", "merge")

    config: AudioConfig
    embed: Callable[..., Tensor]
    block: Callable[..., Tensor]
    merge: Callable[..., Tensor]
    outer_params: Callable[[AudioConfig], dict[str, Param]]
    block_params: Callable[[AudioConfig, int], dict[str, Param]]
    merger_params: Callable[[AudioConfig], dict[str, Param]]
    block_type: type[Any]
    unused: tuple[str, ...] = ()
    modules: tuple[str, ...] = ("",)  # all tensors with a prefix are the tower's
    prefixes: tuple[str, ...] = PREFIXES

    def build(self, make: Callable[[Param], Tensor]) -> AudioWeights:
        """The weights that `make` gives for all parameters, in the order of computation."""
        cfg = self.config

        def made(of: type[Any], declared: dict[str, Param]) -> Any:
            return of(**{name: make(param) for name, param in declared.items()})

        outer = made(AudioOuter, self.outer_params(cfg))
        blocks = tuple(made(self.block_type, self.block_params(cfg, i)) for i in range(cfg.depth))
        return AudioWeights(outer, blocks, made(AudioMerger, self.merger_params(cfg)))
