"""The step of each bucket, made and captured on first use, which is at warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.platforms import attention
from nanovllm.platforms.base import Platform, Replay
from nanovllm.runner.device_graphs import Capture, DecodeStep, PrefillStep, VerifyStep
from nanovllm.runner.inputs import SpanArrays, span_arrays
from nanovllm.runner.mm_embeds import MMEmbedInputs
from nanovllm.runner.spec import EngineSpec, Layout
from nanovllm.runner.steps import Steps


def _as_it_is(step: Callable[[], None]) -> Replay:
    return step


class Captures(NamedTuple):
    """How steps of each kind are captured. Steps that are not captured run op by op; `tower` is
    then None."""

    decode: Capture
    spans: Capture
    tower: Capture | None

    @classmethod
    def of(cls, platform: Platform, spec: EngineSpec, *, is_graph: bool) -> Captures:
        """The captures that the platform and its attention allow. Eager mode captures nothing, so
        that each op is visible where it runs."""
        record = platform.capture if is_graph else _as_it_is
        decode, spans = attention.recordable(spec.attention)
        # the host passes lengths to decode steps only
        others = _as_it_is if platform.traits.wants_lengths else record
        return cls(
            decode=record if decode else _as_it_is,
            spans=others if spans else _as_it_is,
            tower=None if others is _as_it_is else others,
        )


class GraphCache:
    """The steps over one cache."""

    def __init__(
        self,
        steps: Steps,
        platform: Platform,
        layout: Layout,
        captures: Captures,
        given: MMEmbedInputs | None,
    ) -> None:
        """`given` is the memory that prefill steps with embeddings share. Without programs that
        take embeddings, the rare steps that have some get new memory."""
        self._steps, self._platform, self._layout = steps, platform, layout
        self._captures, self._given = captures, given
        self.decode_steps: dict[int, DecodeStep] = {}
        self.resting_steps: dict[int, DecodeStep] = {}  # without the proposer
        # by tokens, and whether embeddings are among the inputs
        self.prefill_steps: dict[tuple[int, bool], PrefillStep] = {}
        self.verify_steps: dict[tuple[int, int], VerifyStep] = {}

    @property
    def variants(self) -> tuple[bool, ...]:
        """The kinds of prefill steps that have programs: with embeddings or not."""
        return (False, True) if self._steps.model.takes_embeddings else (False,)

    def decode(self, num_rows: int, *, rests: bool = False) -> DecodeStep:
        """The step of a bucket; with `rests` the one without the proposer."""
        made = self.resting_steps if rests else self.decode_steps
        step = made.get(num_rows)
        if step is None:
            steps = replace(self._steps, drafting=None) if rests else self._steps
            with torch.no_grad():
                step = DecodeStep(steps, self._platform, self._captures.decode, num_rows)
            made[num_rows] = step
        return step

    def verify(self, num_rows: int, num: int) -> VerifyStep:
        """The step of a bucket of `num` tokens a row; without padding, a new one."""
        step = self.verify_steps.get((num_rows, num))
        if step is None:
            step = VerifyStep(self._steps, self._platform, num_rows, num)
            if self._layout.pad:
                with torch.no_grad():
                    step.capture(self._captures.spans)
                self.verify_steps[num_rows, num] = step
        return step

    def prefill(self, num_tokens: int, num_rows: int, has_given: bool = False) -> PrefillStep:
        """The step of a bucket; without padding, a new one. With `has_given` embeddings and
        positions are among its inputs."""
        step = self.prefill_steps.get((num_tokens, has_given))
        if step is None:
            step = self._new_prefill(num_tokens, num_rows, has_given)
            # without padding every step has a different size
            if self._layout.pad and has_given in self.variants:
                with torch.no_grad():
                    step.build_hidden()
                    step.capture(self._captures.spans)
                self.prefill_steps[num_tokens, has_given] = step
        return step

    def padding(self, num_tokens: int) -> list[PrefillStep]:
        """New prefill steps of a bucket that hold only padding: one for each of its programs."""
        bucket = self._layout.prefill_bucket(num_tokens, 1)
        return [self._new_prefill(*bucket, has_given) for has_given in self.variants]

    def given_inputs(self, num_tokens: int) -> MMEmbedInputs:
        """The inputs that all steps share, or new ones for steps of up to `num_tokens` tokens."""
        return self._given or MMEmbedInputs(self._steps.model.config, self._platform, num_tokens)

    def span_arrays(
        self,
        rows: Sequence[int],
        nums: Sequence[int],
        token_ids: np.ndarray,
        num_tokens: int,
        num_rows: int,
    ) -> SpanArrays:
        """`inputs.span_arrays` with the state's padding row."""
        return span_arrays(
            rows,
            nums,
            token_ids,
            num_rows=num_rows,
            num_tokens=num_tokens,
            pad_row=self._steps.state.pad_row,
        )

    def close(self) -> None:
        """Drop all steps and what they use. Captured ones are in reference cycles, so reference
        counting alone would not free them."""
        made = (self.decode_steps, self.resting_steps, self.prefill_steps, self.verify_steps)
        for steps in made:
            for step in steps.values():
                step.__dict__.clear()
            steps.clear()
        for name in ("_steps", "_given"):
            self.__dict__.pop(name, None)

    def _new_prefill(self, num_tokens: int, num_rows: int, has_given: bool) -> PrefillStep:
        given = self.given_inputs(num_tokens).of(num_tokens) if has_given else None
        return PrefillStep(self._steps, self._platform, num_tokens, num_rows, given)
