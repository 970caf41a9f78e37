"""A captured call of a vision tower. Letters are in `tower`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nanovllm.compile.trace import tensors
from nanovllm.models.vision.interface import Layout
from nanovllm.runner.captured import Capture


class CapturedCall:
    """The call `run` of one budget with static inputs, captured: its launches need no host."""

    def __init__(
        self,
        run: Callable[[Tensor, Layout], Tensor],
        pixel_TC: Tensor,
        layout: Layout,
        capture: Capture,
    ) -> None:
        self._run, self._pixel_TC, self._layout = run, pixel_TC, layout
        self._tokens_LGO: Tensor | None = None
        self._replay = capture(self._launch)

    def __call__(self, pixel_TC: Tensor, layout: Layout) -> Tensor:
        """The tokens of other inputs of the same shapes; the next captured step overwrites them."""
        targets = (self._pixel_TC, *tensors(self._layout))
        for target, source in zip(targets, (pixel_TC, *tensors(layout)), strict=True):
            target.copy_(source)
        self._replay()
        assert self._tokens_LGO is not None
        return self._tokens_LGO

    def _launch(self) -> None:
        self._tokens_LGO = self._run(self._pixel_TC, self._layout)
