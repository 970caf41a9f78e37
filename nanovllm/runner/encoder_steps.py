"""Runs a vision or audio encoder: media are packed into calls of static sizes.

L levels of features | G tokens | O text model's hidden size
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.platforms.base import Platform
from nanovllm.runner.device_graphs import Capture


class EncoderCall(NamedTuple):
    """A call with media. budget: None runs op by op. inputs: those of `EncoderSteps.run`, on the
    device. token_g: the tokens of the call that belong to media; None: the first `num_tokens`."""

    budget: int | None
    inputs: tuple[Any, ...]
    num_tokens: int
    token_g: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EncoderSteps(ABC):
    """The calls of one encoder. Programs are built on first use; warm-up uses every budget.

    `budgets` are the sizes that programs are compiled for, ascending. With `whole` a call is one
    program: some compilers need this. Raises ValueError for budgets below 1.
    """

    name: ClassVar[str]  # of the encoder
    tower: Any
    weights: Any
    platform: Platform
    compiler: Compiler
    budgets: tuple[int, ...]
    whole: bool = False
    _captured: dict[int, CapturedCall] = field(default_factory=dict)

    def __post_init__(self) -> None:
        budgets = list(self.budgets)
        if not budgets or budgets[0] < 1 or budgets != sorted(set(budgets)):
            raise ValueError(
                f"budgets of the {self.name} tower are {budgets}: they must ascend and be at least "
                "1"
            )

    @abstractmethod
    def num_tokens(self, grid: Sequence[int]) -> int:
        """The tokens of an image, a video or a clip."""

    @abstractmethod
    def calls(self, values: Tensor, grids: Sequence[Any]) -> Iterator[EncoderCall]:
        """The calls of media in their order. Raises ValueError as `features`."""

    @abstractmethod
    def padding(self, budget: int) -> tuple[Any, ...]:
        """The inputs of a call of this size whose media are zeros."""

    @abstractmethod
    def run(self, *inputs: Any, few: bool = False) -> Tensor:
        """One call, by a compiler that is the last input: tokens [L, G, O], those of padding
        included. Reads nothing on the host.

        With `few` it runs the fewest blocks that use every program; the result is meaningless.
        """

    def features(self, values: Tensor, grids: Sequence[Any]) -> Tensor:
        """The tokens of media, in order: [L, G, O] on the device, in the tower's dtype.

        Level 0 replaces the placeholders' embeddings. Level l, if there are more, is added to the
        hidden states of these tokens after layer l − 1 of the text model.

        values: the checkpoint processor's output for all media, on the host and of any float dtype:
        patches [patches, C], or mel features [frames, M]. grids: the sizes of each medium. Raises
        ValueError for other shapes, and for a clip that is too short for a token.
        """
        found = [self._tokens(call) for call in self.calls(values, grids)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _tokens(self, call: EncoderCall) -> Tensor:
        """A copy of the tokens of a call's media."""
        captured = None if call.budget is None else self._captured.get(call.budget)
        if captured is not None:
            tokens_LGO = captured(call.inputs)
        else:
            compiler = Compiler(lowering=None) if call.budget is None else self.compiler
            tokens_LGO = self.run(*call.inputs, compiler)
        if call.token_g is not None:
            return tokens_LGO.index_select(1, call.token_g)
        return tokens_LGO[:, : call.num_tokens].clone()

    def run_budget(self, budget: int, *, few: bool = False) -> None:
        """Run a call of this size. `few` is that of `run`."""
        self.run(*self.padding(budget), self.compiler, few=few)

    def capture(self, capture: Capture) -> None:
        """Capture a call of every budget, for `features`. All programs must have run."""

        def run(*inputs: Any) -> Tensor:
            return self.run(*inputs, self.compiler)

        # the largest first: captured calls share one memory pool, and the first one sizes it
        for budget in reversed(self.budgets):
            self._captured[budget] = CapturedCall(run, self.padding(budget), capture)


class CapturedCall:
    """A captured call of one budget with static inputs."""

    def __init__(
        self, run: Callable[..., Tensor], inputs: tuple[Any, ...], capture: Capture
    ) -> None:
        self._run, self._inputs = run, inputs
        self._tokens_LGO: Tensor | None = None
        self._replay = capture(self._launch)

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        """The tokens of other inputs of the same shapes; the next captured step overwrites them."""
        for target, source in zip(tensors(self._inputs), tensors(inputs), strict=True):
            target.copy_(source)
        self._replay()
        assert self._tokens_LGO is not None
        return self._tokens_LGO

    def _launch(self) -> None:
        self._tokens_LGO = self._run(*self._inputs)
