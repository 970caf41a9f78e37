"""Runs an audio tower: chunks of clips are packed into calls of static sizes.

K chunks of a call's budget | F frames in a chunk | M mel bins | G tokens | O text model's hidden
size. The other letters are in `models/audio/audio_encoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.models.audio import layout as layouts
from nanovllm.models.audio.audio_encoder import AudioTower, AudioWeights
from nanovllm.runner.encoder_steps import EncoderCall, EncoderSteps

BUDGETS = (4, 32)  # chunks, of two seconds each in Qwen2.5-Omni; see `AudioSteps`


class Inputs(NamedTuple):
    """A call's inputs on the device."""

    frames_K: Tensor
    start_S: Tensor
    mel_KFM: Tensor


class AudioSteps(EncoderSteps):
    """The calls of an audio tower.

    Budgets are numbers K of chunks. A clip may be cut at the end of any chunk, so every clip fits.
    """

    name = "audio"
    tower: AudioTower
    weights: AudioWeights

    def num_tokens(self, grid: Sequence[int]) -> int:
        """The tokens of a clip of (frames,)."""
        return layouts.num_tokens(grid[0])

    def calls(self, values: Tensor, grids: Sequence[Sequence[int]]) -> Iterator[EncoderCall]:
        """Chunks in order, each call with the smallest budget that takes what is left."""
        cfg = self.tower.config
        clips = [grid[0] for grid in grids]
        if tuple(values.shape) != (sum(clips), cfg.num_mels):
            raise ValueError(
                f"the features of {len(clips)} clips have shape {list(values.shape)}, but their "
                f"lengths require {[sum(clips), cfg.num_mels]}"
            )
        chunks = layouts.chunks(clips, cfg.chunk_frames)
        first, num = 0, len(chunks.frames)
        while first < num:
            left = num - first
            budget = next((one for one in self.budgets if one >= left), self.budgets[-1])
            part = layouts.Chunks(*(array[first : first + budget] for array in chunks))
            places = layouts.tokens(part.frames, cfg.chunk_frames // 2)
            token_g = self.platform.upload(places, torch.int64)
            inputs = self.inputs(values, part, budget)
            yield EncoderCall(budget, (inputs,), len(places), token_g)
            first += budget

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
        )

    def run(  # type: ignore[override]
        self, inputs: Inputs, compiler: Compiler, *, few: bool = False
    ) -> Tensor:
        """See `EncoderSteps`: the tokens of all K chunks."""
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
        tokens_GO: Tensor = program("merge", partial(tower.merge, cfg), w=weights.merger, h_TD=h_TD)
        return tokens_GO.unsqueeze(0)

    def padding(self, budget: int) -> tuple[Inputs]:
        """The clip is one chunk of silence."""
        cfg = self.tower.config
        chunks = layouts.chunks([cfg.chunk_frames], cfg.chunk_frames)
        return (self.inputs(torch.zeros((cfg.chunk_frames, cfg.num_mels)), chunks, budget),)
