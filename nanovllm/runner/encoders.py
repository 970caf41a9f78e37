"""The vision and audio encoders ("towers") of a model, which compute embeddings of media.

L levels of features | G tokens | O their width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.models.model import Model, Params
from nanovllm.models.pooling import PoolWeights
from nanovllm.platforms.base import Platform
from nanovllm.runner.audio_tower import AudioSteps
from nanovllm.runner.device_graphs import Capture
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.encoder_steps import EncoderSteps
from nanovllm.runner.no_grad import without_grad
from nanovllm.runner.spec import Layout
from nanovllm.runner.tower import TowerSteps


class MMItem(NamedTuple):
    """The input of an encoder: an image, a video or an audio clip, in the form of the checkpoint's
    processor. `values` are patches and `grid` their (frames, rows, columns), or mel features and
    their (frames,). `tower` is a key of `Encoders.by_name`."""

    values: Tensor
    grid: tuple[int, ...]
    tower: str = "vision"


class Encoders:
    """The calls of a model's towers, "vision" and "audio". A text model has none."""

    def __init__(
        self,
        model: Model,
        params: Params | PoolWeights,
        platform: Platform,
        compiler: Compiler,
        layout: Layout,
        embeddings: Embeddings,
    ) -> None:
        self.by_name: dict[str, EncoderSteps] = {}
        self._embeddings, self._dtype = embeddings, model.config.dtype
        whole = platform.traits.whole_steps
        if model.tower is not None:
            self.by_name["vision"] = TowerSteps(
                model.tower, params.tower, platform, compiler, layout.vision_patches, whole
            )
        if model.audio_tower is not None:
            # its regions are separate programs, which such platforms do not support
            own = Compiler(None) if whole else compiler
            self.by_name["audio"] = AudioSteps(
                model.audio_tower, params.audio_tower, platform, own, layout.audio_chunks
            )

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    @without_grad
    def run_largest(self) -> None:
        """Run the largest call of each tower."""
        for tower in self.by_name.values():
            tower.run_budget(tower.budgets[-1])

    def run_bucket(self, name: str, size: int) -> None:
        """Build and run the programs of a call of this size."""
        self.by_name[name].run_budget(size, few=True)

    def warm_up(self, capture: Capture | None, progress: Callable[[str], object]) -> None:
        """Build and run the calls of all sizes, and capture those that `capture` is for."""
        for name, tower in self.by_name.items():
            for budget in reversed(tower.budgets):
                progress(f"{name} {budget}")
                tower.run_budget(budget, few=True)
            if capture is not None:
                tower.capture(capture)

    @without_grad
    def encode(self, media: Mapping[str, MMItem]) -> None:
        """Compute the embeddings of images, videos or clips, and keep them under these keys for the
        next step at least. Does not wait for the device."""
        for name, tower in self.by_name.items():
            own = {key: one for key, one in media.items() if one.tower == name}
            if not own:
                continue
            values = torch.cat([one.values for one in own.values()])
            grids = [one.grid for one in own.values()]
            features_LGO = tower.features(values, grids)
            sizes = [tower.num_tokens(grid) for grid in grids]
            for key, part_LGO in zip(own, features_LGO.split(sizes, dim=1)):
                embeds = part_LGO.transpose(0, 1).flatten(1).to(self._dtype)
                self._embeddings.keep(key, embeds)
