"""The interface of a vision encoder: its sizes, inputs, parameters and regions.

T patches | m merge size | G = T / m² groups: one placeholder token each | C numbers in a patch
D hidden | N heads | H head size | E = 3D | F MLP width | O text model's hidden size | M = m²·D
L = 1 + levels of deepstack | S starts of segments, one more than there are segments.

A frame is one image, or one step in time of a video. Attention stays within a frame, so the frames
of a video may be encoded in different calls.

All that depends on the sizes of frames is an input that the host computes from these sizes
(`layout`). So one program serves all frames that fit its T patches; the rest of T is padding.

Cost. Attention takes 4·T·D floating-point operations a token and layer where a frame fills T, the
products take 24·D² (Qwen3-VL) and 8·D² + 6·D·F (Qwen2.5-VL). At 4,096 patches and D = 1,024
attention is 40 % of the work of Qwen3-VL-2B. `ops.varlen_attention` computes each segment by
itself: windows of 64 patches cost next to nothing. A boolean mask over all T patches would cost
4·T·D for every layer, and the kernels that take masks are slower. On CUDA it launches T / 128 + S
tiles of queries for each head: one frame that fills T leaves MAX_FRAMES of them empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.models.model import Param

MAX_FRAMES = 16  # in one call: see above
# The prefixes of a tower's tensors, in checkpoints of transformers 5 and in releases.
PREFIXES = ("model.visual.", "visual.")


class BlockCall(NamedTuple):
    """How a block is called: the most patches of one of its windows, 0 if it attends within frames,
    and whether a level of features follows it."""

    window_patches: int
    makes_level: bool


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Frozen description of one checkpoint's tower. Raises ValueError for sizes that do not fit.

    `depth` blocks of `num_heads` heads. Frames come as patches of `patch_shape` numbers (channels,
    frames, rows, columns), `merge_size`² of which make one token of `out_size` numbers. Blocks of
    `full_blocks` attend within a frame, the others within windows of `window_groups`² tokens.
    After each block of `deepstack_blocks` the tower makes one more level of features. Positions are
    rotary with base `rope_theta` and, if `table_side` is not 0, a learned table of `table_side`
    rows and columns is added. Frames of a video are `tokens_per_second` positions in time apart for
    each second between them; with `videos_span_time` the text continues after the last of them.
    If `frame_side` is not 0, every frame has so many rows and columns of patches; if `max_side` is
    not 0, at most so many. `is_clipped` and `standardizes` say whether a tower has those weights.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "hidden_size", "num_heads", "merge_size", "norm_eps", "rope_theta",
    )  # fmt: skip

    architecture: str
    depth: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    out_size: int
    patch_shape: tuple[int, int, int, int]
    merge_size: int
    full_blocks: tuple[int, ...]
    window_groups: int = 0
    deepstack_blocks: tuple[int, ...] = ()
    table_side: int = 0
    frame_side: int = 0
    max_side: int = 0
    is_clipped: bool = False
    standardizes: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tokens_per_second: float = 1.0
    videos_span_time: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        sizes = {
            "depth": self.depth, "hidden_size": self.hidden_size, "num_heads": self.num_heads,
            "intermediate_size": self.ffn_size, "out_hidden_size": self.out_size,
            "spatial_merge_size": self.merge_size, "the patch's sizes": min(self.patch_shape),
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} of the vision tower is {value}: it must be at least 1")
        if self.hidden_size % self.num_heads or self.head_dim % 8:
            raise ValueError(
                f"the vision tower's hidden_size {self.hidden_size} must be its {self.num_heads} "
                "heads times a multiple of 8"
            )
        for name in ("full_blocks", "deepstack_blocks"):
            wrong = [i for i in getattr(self, name) if not 0 <= i < self.depth]
            if wrong:
                raise ValueError(
                    f"block {wrong[0]} of the vision tower is listed, but it has {self.depth}"
                )
        if len(self.full_blocks) < self.depth and self.window_groups < 1:
            raise ValueError(
                "the vision tower's window_size is smaller than the patches of one token"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_group(self) -> int:
        return self.merge_size**2

    @property
    def patch_size(self) -> int:
        """C: the numbers in a patch."""
        return math.prod(self.patch_shape)

    @property
    def calls(self) -> tuple[BlockCall, ...]:
        """How each block is called."""
        return tuple(
            BlockCall(
                0 if block_idx in self.full_blocks else self.max_window_patches,
                block_idx in self.deepstack_blocks,
            )
            for block_idx in range(self.depth)
        )

    @property
    def num_levels(self) -> int:
        """L: the embedding, and one level for each of `deepstack_blocks`."""
        return 1 + len(self.deepstack_blocks)

    @property
    def has_windows(self) -> bool:
        return len(self.full_blocks) < self.depth

    @property
    def max_window_patches(self) -> int:
        return self.window_groups**2 * self.patches_per_group


class Windows(NamedTuple):
    """The order in which a tower with windows computes: window by window."""

    order_G: Any  # the group that is at each place
    place_G: Any  # the place of each group
    start_S: Any  # int32: windows' first patches, then the end of the last


class Taps(NamedTuple):
    """The 4 entries of the learned table between which each patch's position embedding is
    interpolated."""

    entry_T4: Any
    weight_T4: Any  # fp32


class FrameLayout(NamedTuple):
    """The inputs of a tower that depend on the frames' sizes; tensors, or arrays on the host.

    Patches are in the order in which the tower computes: that of `windows` if it has some. Indices
    are int64. Padding follows the last frame.
    """

    row_col_T2: Any  # the row and column of each patch in its frame
    frame_start_S: Any  # int32: frames' first patches, then the end of the last
    windows: Windows | None
    taps: Taps | None


class Outer(NamedTuple):
    """The weights of a tower before its first block."""

    patch_DCTPP: Tensor
    patch_bias_D: Tensor | None
    table_ID: Tensor | None  # I = table_side²: learned positions


class Merger(NamedTuple):
    """The weights that make one token of m² patches; the norm has size M if it is after merging."""

    norm: Tensor
    norm_bias: Tensor | None
    up_MM: Tensor
    up_bias_M: Tensor
    down_OM: Tensor
    down_bias_O: Tensor


class TowerWeights(NamedTuple):
    """All weights of a tower. `blocks` are the architecture's own named tuples."""

    outer: Any  # `Outer` or the architecture's own
    blocks: tuple[Any, ...]
    mergers: tuple[
        Any, ...
    ]  # `Merger` or the architecture's own, of the embedding, then of each level of deepstack


@dataclass(frozen=True)
class Tower:
    """One checkpoint's tower: its config, and the functions of its regions.

    `embed(config, w, layout, pixel_TC)` gives the hidden state [T, D] and the rotary table [T, H],
    or None;
    `block(config, max_len, w, rope_TH, start_S, h_TD)` gives the next hidden state, where segments
    have at most `max_len` patches; `merge(config, w, place_G, h_TD)` gives tokens [G, O] in the
    order of frames. All are pure functions at the top of a module, and may read GRAPH_FIELDS only.

    `outer_params(config)`, `block_params(config, block_idx)` and `merger_params(config, level)`
    declare parameters by the fields of `outer_type`, `block_type` and `merger_type`. Fields that
    are not declared are None. Sources are named without one of `prefixes`, and begin with one of
    `modules`. `unused` are the beginnings of tensors of the tower that no region reads.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = ("config", "embed", "block", "merge")

    config: TowerConfig
    embed: Callable[..., tuple[Tensor, Tensor | None]]
    block: Callable[..., Tensor]
    merge: Callable[..., Tensor]
    outer_params: Callable[[TowerConfig], dict[str, Param]]
    block_params: Callable[[TowerConfig, int], dict[str, Param]]
    merger_params: Callable[[TowerConfig, int], dict[str, Param]]
    block_type: type[Any]
    unused: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = PREFIXES
    modules: tuple[str, ...] = ("",)
    outer_type: type[Any] = Outer
    merger_type: type[Any] = Merger

    def build(self, make: Callable[[Param], Tensor]) -> TowerWeights:
        """The weights that `make` gives for all parameters, in the order of computation."""
        cfg = self.config

        def made(of: type[Any], declared: dict[str, Param]) -> Any:
            values = {name: make(param) for name, param in declared.items()}
            return of(**(dict.fromkeys(of._fields) | values))

        outer = made(self.outer_type, self.outer_params(cfg))
        blocks = tuple(made(self.block_type, self.block_params(cfg, i)) for i in range(cfg.depth))
        levels = range(cfg.num_levels)
        mergers = tuple(made(self.merger_type, self.merger_params(cfg, one)) for one in levels)
        return TowerWeights(outer, blocks, mergers)
