"""Runs an audio tower: chunks of clips are packed into calls of static sizes.

K chunks of a call's budget | F frames in a chunk | M mel bins | G tokens | O text model's hidden
size. The other letters are in `models/audio/interface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.models.audio import layout as layouts
from nanovllm.models.audio.interface import AudioTower, AudioWeights
from nanovllm.platforms.base import Platform

BUDGETS = (4, 32)  # chunks, of two seconds each in Qwen2.5-Omni; see `AudioSteps`


class Inputs(NamedTuple):
    """A call's inputs on the device. `token_g` says which tokens of the call are of clips."""

    frames_K: Tensor
    start_S: Tensor
    mel_KFM: Tensor
    token_g: Tensor


@dataclass(frozen=True, eq=False)
class AudioSteps:
    """The calls of one tower. Programs are built on first use; warm-up uses every budget.

    `budgets` are the numbers K of chunks that programs are compiled for, ascending. A clip may be
    cut at the end of any chunk, so every clip fits. Raises ValueError for budgets below 1.
    """

    tower: AudioTower
    weights: AudioWeights
    platform: Platform
    compiler: Compiler
    budgets: tuple[int, ...]

    def __post_init__(self) -> None:
        budgets = list(self.budgets)
        if not budgets or budgets[0] < 1 or budgets != sorted(set(budgets)):
            raise ValueError(
                f"budgets of the audio tower are {budgets}: they must ascend and be at least 1"
            )

    @staticmethod
    def num_tokens(grid: Sequence[int]) -> int:
        """The tokens of a clip of (frames,)."""
        return layouts.num_tokens(grid[0])

    def features(self, mels: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """The tokens of clips, in order: [1, G, O] on the device, in the tower's dtype.

        mels: the mel features [frames, M] of all clips, as the checkpoint's feature extractor gives
        them, on the host and of any float dtype. grids: the (frames,) of each clip. Raises
        ValueError for other shapes, and for a clip that is too short for a token.
        """
        cfg = self.tower.config
        clips = [grid[0] for grid in grids]
        if tuple(mels.shape) != (sum(clips), cfg.num_mels):
            raise ValueError(
                f"the features of {len(clips)} clips have shape {list(mels.shape)}, but their "
                f"lengths ask for {[sum(clips), cfg.num_mels]}"
            )
        found = [
            self.run(inputs, self.compiler).index_select(0, inputs.token_g)
            for inputs in self._calls(mels, layouts.chunks(clips, cfg.chunk_frames))
        ]
        return torch.cat(found).unsqueeze(0)

    def inputs(self, mels: Tensor, chunks: layouts.Chunks, budget: int) -> Inputs:
        """A call's inputs, padded to its budget."""
        cfg, upload = self.tower.config, self.platform.upload
        positions = cfg.chunk_frames // 2
        mel_KFM = torch.zeros((budget, cfg.chunk_frames, cfg.num_mels), dtype=cfg.dtype)
        for i, (first, num) in enumerate(zip(chunks.first.tolist(), chunks.frames.tolist())):
            mel_KFM[i, :num] = mels[first : first + num]
        frames_K = np.zeros(budget, np.int64)
        frames_K[: len(chunks.frames)] = chunks.frames
        return Inputs(
            frames_K=upload(frames_K, torch.int64),
            start_S=upload(layouts.starts(frames_K, positions), torch.int32),
            mel_KFM=upload(mel_KFM, cfg.dtype),
            token_g=upload(layouts.tokens(chunks.frames, positions), torch.int64),
        )

    def run(self, inputs: Inputs, compiler: Compiler, *, few: bool = False) -> Tensor:
        """One call: the tokens [G, O] of all K chunks. Reads nothing on the host. With `few` it
        runs one block, and the result means nothing."""
        tower, weights, budget = self.tower, self.weights, len(inputs.frames_K)
        cfg = tower.config

        def program(name: str, function: Callable[..., Any], **given: object) -> Any:
            made = compiler.program(f"audio_{name}", (budget,), function, given)
            return made(*given.values())

        h_TD = program(
            "embed", partial(tower.embed, cfg),
            w=weights.outer, frames_K=inputs.frames_K, mel_KFM=inputs.mel_KFM,
        )  # fmt: skip
        for w in weights.blocks[:1] if few else weights.blocks:
            h_TD = program(
                "block", partial(tower.block, cfg), w=w, start_S=inputs.start_S, h_TD=h_TD
            )
        return program("merge", partial(tower.merge, cfg), w=weights.merger, h_TD=h_TD)

    def run_budget(self, budget: int, *, few: bool = False) -> None:
        """Run a call with one chunk of silence. With `few` it has one block, which is enough to
        build its programs."""
        cfg = self.tower.config
        chunks = layouts.chunks([cfg.chunk_frames], cfg.chunk_frames)
        mels = torch.zeros((cfg.chunk_frames, cfg.num_mels))
        self.run(self.inputs(mels, chunks, budget), self.compiler, few=few)

    def _calls(self, mels: Tensor, chunks: layouts.Chunks) -> Iterator[Inputs]:
        """Chunks in order, each call with the smallest budget that takes what is left."""
        first, num = 0, len(chunks.frames)
        while first < num:
            left = num - first
            budget = next((one for one in self.budgets if one >= left), self.budgets[-1])
            part = layouts.Chunks(*(array[first : first + budget] for array in chunks))
            yield self.inputs(mels, part, budget)
            first += budget
