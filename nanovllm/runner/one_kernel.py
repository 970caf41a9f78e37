"""Before decode steps are captured: what those whose layers and head are one launch need
(`persistent.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from nanovllm.compile.lower.persistent.plan import Unfit
from nanovllm.runner.persistent import Form, Parts, plan_of
from nanovllm.runner.state import Span
from nanovllm.runner.steps import Steps


def begin(
    steps: Steps, row_idx_R: Tensor, sizes: Sequence[int], verify_tokens: Sequence[int]
) -> None:
    """Begin to build the decode steps of `sizes` rows, and those that verify, with so many tokens a
    row."""
    if steps.persistent is None:
        return
    forms = [Form(num_rows) for num_rows in sizes]
    forms += [
        Form(num_rows * num, has_several=True)
        for num_rows in sizes
        for num in verify_tokens
        if steps.verifies_rows_of(num_rows, num_rows * num)
    ]
    taken = [form for form in dict.fromkeys(forms) if steps.persistent.may_take(form)]
    if taken:
        steps.persistent.begin(_parts(steps), *steps.begin(row_idx_R), taken)


def store_plan(steps: Steps, row_idx_R: Tensor) -> None:
    """Let the store have the plan that `begin` reads at a start, or why there is none."""
    if steps.persistent is not None and steps.persistent.may_take(Form(len(row_idx_R))):
        with suppress(Unfit):  # the reason is stored, and `begin` logs it
            plan_of(_parts(steps), *steps.begin(row_idx_R))


def prepare_decode(steps: Steps, row_idx_R: Tensor) -> None:
    """Build a decode step."""
    if steps.persistent is not None and steps.persistent.may_take(Form(len(row_idx_R))):
        steps.persistent.prepare(_parts(steps), *steps.begin(row_idx_R))


def prepare_verify(steps: Steps, span: Span) -> None:
    """Build a step that verifies."""
    num_tokens = len(span.token_T)
    if steps.persistent is None or not steps.verifies_rows_of(len(span.row_idx_R), num_tokens):
        return
    if steps.persistent.may_take(Form(num_tokens, has_several=True)):
        h_TD, _, batch = steps.begin_span(span, verifies=True, each=True)
        steps.persistent.prepare(_parts(steps), h_TD, batch, has_several=True)


def _parts(steps: Steps) -> Parts:
    return Parts(
        steps.model, steps.params, steps.caches, steps.cos_sin_MH, steps.attention,
        steps.compiler, is_plain=not steps.other_tables and steps.model.layer_inputs is None,
    )  # fmt: skip
