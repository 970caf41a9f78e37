"""The steps of one bucket: static inputs and outputs, and the launches between them.

A step reads and writes the same memory each time, so it can be captured. A captured step launches
its kernels without the host: launches are most of the time of a decode step or a short prompt.

R rows | T tokens | K tokens a row | D hidden | V vocabulary | W columns of this rank's logits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanovllm.platforms.base import Platform, Replay
from nanovllm.runner import one_kernel
from nanovllm.runner.inputs import SpanArrays
from nanovllm.runner.mm_embeds import MMEmbeds
from nanovllm.runner.sampling import Kind, Variant, logprobs
from nanovllm.runner.state import Span, SpanTokens, accept_and_advance
from nanovllm.runner.steps import Hidden, Steps

Capture = Callable[[Callable[[], None]], Replay]


class DecodeStep:
    """A step in which R rows of the state feed their newest token.

    It is captured with the plain sampler; without a sampler or with another one on first use.
    """

    def __init__(self, steps: Steps, platform: Platform, capture: Capture, num_rows: int) -> None:
        device = platform.device
        pad_row = steps.state.pad_row
        self.row_idx_R = torch.full((num_rows,), pad_row, dtype=torch.int64, device=device)
        self.token_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.rows: list[int] = []  # the content of row_idx_R
        self._steps, self._platform, self._capture = steps, platform, capture
        self._logits_RW: Tensor | None = None
        self._logits: Replay | None = None
        self._variants: dict[Kind, tuple[int, Replay]] = {}  # by kind: version, step
        # The first run is not captured: Triton loads or compiles kernels, and cuBLAS allocates its
        # workspace.
        self._launch(steps.of_each_program())
        one_kernel.prepare_decode(steps, self.row_idx_R)
        self.replay = capture(self.launch)

    def fill(self, rows: list[int]) -> None:
        """Set the rows of the state; the bucket's other rows are padding. Does not synchronise."""
        padded = rows + [self._steps.state.pad_row] * (self.row_idx_R.shape[0] - len(rows))
        if padded != self.rows:
            self.rows = []  # stays empty if the copy fails
            self.row_idx_R.copy_(self._platform.upload(padded, torch.int64))
            self.rows = padded

    def logits(self) -> Tensor:
        """The logits [R, V] of the step without its sampler, with the programs of the whole step.

        If the whole step is one program, it runs with its sampler, and the state is restored.
        """
        if self._steps.whole:
            with self._steps.restoring_state():
                self.replay()
        else:
            if self._logits is None:
                self._logits = self._capture(self._without_sampler)
            self._logits()
        assert self._logits_RW is not None
        return self._steps.gathered(self._logits_RW)

    def replay_with(self, variant: Variant) -> None:
        """The whole step with another sampler."""
        version, replay = self._variants.get(variant.kind, (None, None))
        if replay is None or version != variant.version:
            rows = self.rows
            self.fill([])  # the first run changes no request
            self._launch_with(variant, self._steps.of_each_program())  # not captured, as above
            replay = self._capture(partial(self._launch_with, variant, self._steps))
            self._variants[variant.kind] = variant.version, replay
            self.fill(rows)
        replay()

    def launch(self) -> None:
        """The whole step, op by op."""
        self._launch(self._steps)

    def _launch(self, steps: Steps) -> None:
        with steps.proposing(self.row_idx_R):
            token_R, logits_RW = steps.decode(self.row_idx_R)
            self.token_R.copy_(token_R)
        if steps.whole:
            self._logits_RW = logits_RW

    def _launch_with(self, variant: Variant, steps: Steps) -> None:
        with steps.proposing(self.row_idx_R):
            logits_RV = steps.gathered(steps.decode_logits(self.row_idx_R))
            self.token_R.copy_(variant.choose(self.row_idx_R, logits_RV))

    def _without_sampler(self) -> None:
        self._logits_RW = self._steps.decode_logits(self.row_idx_R)


class SpanStep(ABC):
    """The static inputs of a step in which R rows feed T packed tokens. Initially all padding."""

    def __init__(self, steps: Steps, platform: Platform, num_tokens: int, num_rows: int) -> None:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=platform.device)

        self.span = Span(zeros(num_rows) + steps.state.pad_row, zeros(num_rows), zeros(num_tokens))
        self._steps, self._platform = steps, platform
        self._captured: Replay | None = None

    @property
    def replay(self) -> Replay:
        """The whole step: as captured, else op by op. An attribute would hold the step itself, and
        so the weights, until garbage is collected."""
        return self._captured or self.launch

    def fill(self, arrays: SpanArrays) -> None:
        """Copy arrays to the step's static inputs. Does not synchronise."""
        for target, values in zip(self.span, arrays):
            self._platform.write(target, values)

    def capture(self, capture: Capture) -> None:
        """Capture the launches as `replay`. This runs the step, so it must hold only padding."""
        self._launch(self._steps.of_each_program())
        self._captured = capture(self.launch)

    def launch(self) -> None:
        """The whole step, op by op."""
        self._launch(self._steps)

    @abstractmethod
    def _launch(self, steps: Steps) -> None:
        """Run the step with these steps' programs, and keep its results."""


class PrefillStep(SpanStep):
    """Writes keys and values of prompts and chooses the next token of each row.

    `given` are static inputs as well; None for steps with token ids only.
    """

    def __init__(
        self,
        steps: Steps,
        platform: Platform,
        num_tokens: int,
        num_rows: int,
        given: MMEmbeds | None = None,
    ) -> None:
        super().__init__(steps, platform, num_tokens, num_rows)
        self.given = given
        self.token_R = torch.zeros_like(self.span.row_idx_R)

    def _launch(self, steps: Steps) -> None:
        with steps.proposing(self.span):
            self.token_R.copy_(self.sample(steps.prefill_logits(self.span, self.given), steps))

    def sample(self, logits_RW: Tensor, steps: Steps | None = None) -> Tensor:
        """Run the plain sampler; returns token_R."""
        steps = steps or self._steps
        return steps.sample(self.span.row_idx_R, logits_RW, self.span.num_tokens_R)

    def logits(self) -> Tensor:
        """The step without the sampler, op by op: the logits [R, V] after each row's last token."""
        return self._steps.gathered(self._steps.prefill_logits(self.span, self.given))

    def hidden(self) -> Hidden:
        """The step without head and sampler, op by op: see `Steps.hidden`."""
        return self._steps.hidden(self.span, self.given)

    def logits_at(self, hidden: Hidden, index_R: Tensor) -> Tensor:
        """See `Steps.logits_at`."""
        return self._steps.logits_at(hidden, index_R)

    def build_hidden(self) -> None:
        """Run `hidden` if it needs programs that `launch` does not use: warm-up must build them."""
        if not self._steps.whole and self._steps.model.last_layer_needs_own_program:
            self.hidden()


class VerifyStep(SpanStep):
    """Feeds up to K tokens of each row, its newest and proposals, and keeps the accepted ones."""

    def __init__(self, steps: Steps, platform: Platform, num_rows: int, num: int) -> None:
        super().__init__(steps, platform, num_rows * num, num_rows)
        self.num = num
        self.token_RK = self.span.token_T.new_zeros((num_rows, num))
        self.count_R = torch.zeros_like(self.span.row_idx_R)
        self._logits: tuple[Tensor, SpanTokens] | None = None
        self._capture: Capture | None = None
        self._filled: SpanArrays | None = None  # the content of the span
        # by kind and number of log-probabilities: version, step
        self._variants: dict[tuple[Kind, int | None], tuple[int, Replay]] = {}
        self._logprobs: dict[tuple[Kind, int | None], tuple[Tensor, ...]] = {}

    def fill(self, arrays: SpanArrays) -> None:
        """See `SpanStep`. While the same rows verify drafts of the state, nothing is copied."""
        filled = self._filled
        if filled is None or not all(map(np.array_equal, arrays, filled)):
            self._filled = None  # stays so if a copy fails
            super().fill(arrays)
            self._filled = arrays

    def capture(self, capture: Capture) -> None:
        one_kernel.prepare_verify(self._steps, self.span)
        super().capture(capture)
        self._capture = capture

    def replay_with(self, variant: Variant) -> tuple[Tensor, ...]:
        """The whole step with another sampler. It is captured on first use. Returns
        `sampling.logprobs` of all tokens that the step feeds, if the variant has any."""
        key = variant.kind, variant.num_logprobs
        version, replay = self._variants.get(key, (None, None))
        if replay is None or version != variant.version:
            launch = partial(self._launch_with, variant)
            replay = partial(launch, self._steps)
            if self._capture is not None:
                given, filled = [one.clone() for one in self.span], self._filled
                self._filled = None
                self.span.row_idx_R.fill_(self._steps.state.pad_row)  # it changes no request
                self.span.num_tokens_R.zero_()
                launch(self._steps.of_each_program())  # not captured: it loads kernels
                replay = self._capture(replay)
                for target, values in zip(self.span, given):
                    target.copy_(values)
                self._filled = filled
                self._variants[key] = variant.version, replay
        replay()
        return self._logprobs[key]

    def _launch_with(self, variant: Variant, steps: Steps) -> None:
        with steps.proposing(self.span, self.num):
            logits_TW, tokens = steps.verify_logits(self.span, self.num)
            found = self._accept(variant, steps.gathered(logits_TW), tokens)
        self._logprobs[variant.kind, variant.num_logprobs] = found

    def accept(self, variant: Variant) -> tuple[Tensor, ...]:
        """`replay_with` op by op, where the step is one program with its own sampler."""
        with self._steps.proposing(self.span, self.num):
            return self._accept(variant, *self.logits())

    def _accept(
        self, variant: Variant, logits_TV: Tensor, tokens: SpanTokens
    ) -> tuple[Tensor, ...]:
        chosen_T = variant.verify(tokens.row_T, logits_TV, tokens.num_T)
        state, rate = self._steps.state, self._steps.synthetic_rate
        self._set(*accept_and_advance(self.num, state, self.span, tokens, chosen_T, rate))
        num_top = variant.num_logprobs
        return () if num_top is None else logprobs(logits_TV, chosen_T, num_top)

    def _launch(self, steps: Steps) -> None:
        with steps.proposing(self.span, self.num):
            token_RK, count_R, logits_TW, tokens = steps.verify(self.span, self.num)
            self._set(token_RK, count_R)
        if steps.whole:
            self._logits = logits_TW, tokens

    def _set(self, token_RK: Tensor, count_R: Tensor) -> None:
        self.token_RK.copy_(token_RK)
        self.count_R.copy_(count_R)

    def logits(self) -> tuple[Tensor, SpanTokens]:
        """The logits [T, V] of the tokens of a step that is one program with its sampler."""
        with self._steps.restoring_state():
            self.replay()
        assert self._logits is not None
        logits_TW, tokens = self._logits
        return self._steps.gathered(logits_TW), tokens
