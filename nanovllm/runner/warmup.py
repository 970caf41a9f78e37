"""Parts of warm-up that do not change a runner: a dry run of a bucket, timing steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from nanovllm.kernels import collectives
from nanovllm.models.experts.offloaded import prepare
from nanovllm.platforms.base import DryRun
from nanovllm.runner import one_kernel
from nanovllm.runner.device_graphs import VerifyStep
from nanovllm.runner.ngram import Ngram
from nanovllm.runner.runner import Runner
from nanovllm.runner.steps import ALONE, Steps
from nanovllm.schedule.draft_length import StepTimes
from nanovllm.schedule.pace import DecodePace
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound

logger = logging.getLogger(__name__)

# The context against which attention is timed. It is long, so that attention is most of the step.
STALL_CONTEXT_TOKENS = 16_384
# A step is timed twice, or once if it takes at least this many milliseconds, where noise is small.
STALL_REPEATS, STALL_LONG_MS = 2, 20.0
# Decode steps are compared with each other, and are short: noise would decide.
COMPARED_REPEATS = 8
BUS_REPEATS = 3


def dry_run_bucket(runner: Runner, kind: str, size: int, dry_run: DryRun) -> None:
    """Build the programs of one bucket, and call them with fake tensors of the dry run's mode.

    A runner that was made under that mode computes nothing and takes no memory. Its
    `compiler.instead` must stand in for the programs.
    """
    with torch.no_grad():
        for steps, buckets in zip(runner.all_steps, runner.all_buckets):
            if kind == "prefill":
                with dry_run.mode:
                    prefill = buckets.padding(size)
                for step in prefill:
                    with steps.proposing(step.span):
                        step.sample(steps.prefill_logits(step.span, step.given))
                    step.build_hidden()
            else:
                _dry_run_rows(runner, steps, size, dry_run)
        if kind == "decode" and size == runner.layout.decode_rows[0]:
            with dry_run.mode:
                row_idx_R = torch.zeros(size, dtype=torch.int64, device=runner.platform.device)
            one_kernel.store_plan(runner.steps, row_idx_R)
            runner.sampler.dry_run(dry_run)
            _dry_run_lookup(runner, dry_run)


def _dry_run_rows(runner: Runner, steps: Steps, num_rows: int, dry_run: DryRun) -> None:
    platform, layout = runner.platform, runner.layout
    with dry_run.mode:
        row_idx_R = torch.zeros(num_rows, dtype=torch.int64, device=platform.device)
        verify = [VerifyStep(steps, platform, num_rows, num) for num in layout.verify_tokens]
    with ALONE if runner.rests else steps.proposing(row_idx_R):
        steps.decode(row_idx_R)
    for one in verify:
        with steps.proposing(one.span, one.num):
            steps.verify(one.span, one.num)


def _dry_run_lookup(runner: Runner, dry_run: DryRun) -> None:
    """The kernel that a proposer launches itself, which is the same for all rows."""
    draft = runner.spec.draft
    if draft is None or not isinstance(draft.proposer, Ngram):
        return
    with dry_run.mode:
        row_idx_R = torch.zeros(1, dtype=torch.int64, device=runner.platform.device)
    dry_run.visit(*draft.proposer.call(runner.state, row_idx_R), {})


def measure_prefill_latency_bound(runner: Runner, max_ms: float) -> PrefillLatencyBound:
    """Time prefill steps of padding, and one whose tokens attend to a long context.

    `Runner.warm_up` must have run.
    """
    sizes, max_model_len = runner.layout.prefill_tokens, runner.layout.max_model_len
    step_ms: list[tuple[int, float]] = []
    longest_ms = 0.0
    for num_tokens in sizes:
        longest_ms = max(longest_ms, _prefill_ms(runner, num_tokens))  # anything less is noise
        step_ms.append((num_tokens, longest_ms))
    num_tokens = min(sizes[-1], max_model_len)
    alone_ms = longest_ms if num_tokens == sizes[-1] else _prefill_ms(runner, num_tokens)
    context = min(max_model_len, max(2 * num_tokens, STALL_CONTEXT_TOKENS))
    attended = num_tokens * (context - num_tokens / 2)
    attention_ms = max(0.0, _prefill_ms(runner, num_tokens, context) - alone_ms) / attended
    bound = PrefillLatencyBound(max_ms, tuple(step_ms), attention_ms)
    logger.debug("prefill steps: %s", bound)
    return bound


def measure_pace(runner: Runner) -> DecodePace:
    """Time the smallest and the largest decode step. `Runner.warm_up` must have run.

    Returns no times if steps have no padding, or if experts are in host memory, since the fetched
    experts depend on the tokens.
    """
    if not runner.layout.pad or runner.offloaded:
        return DecodePace()
    step_ms = []
    for num_rows in sorted({runner.layout.decode_rows[0], runner.layout.decode_rows[-1]}):
        step = runner.buckets.decode(num_rows, rests=runner.rests)
        step.fill([])

        def announce(num_rows: int = num_rows) -> None:
            runner.announce([], num_rows)

        step_ms.append((num_rows, _best_ms(runner, step.replay, announce)))
    moe = runner.cfg.moe
    token_bytes = runner.model.page_groups.token_bytes(runner.spec.cache_dtype)
    spread = 1.0 if moe is None else moe.num_experts / moe.top_k
    return DecodePace(tuple(step_ms), token_bytes / max(1, runner.weights_bytes), spread)


def measure_step_times(runner: Runner) -> StepTimes | None:
    """Time the decode steps of all buckets and draft lengths; None unless the number of draft
    tokens adapts. `Runner.warm_up` must have run."""
    draft, layout = runner.spec.draft, runner.layout
    if draft is None or not draft.adapts:
        return None
    ms_RK, reading_R = [], []
    for num_rows in layout.decode_rows:
        kinds = runner.kinds_of_plain
        *reading, plain = (runner.buckets.decode(num_rows, rests=rests) for rests in kinds)
        for one in (plain, *reading):
            one.fill([])
        verifying = [runner.buckets.verify(num_rows, num) for num in layout.verify_tokens]
        replays = [plain.replay, *(one.replay for one in verifying)]
        replays += [one.replay for one in reading]
        ms = [_best_ms(runner, one, repeats=COMPARED_REPEATS) for one in replays]
        ms_RK.append(ms[: 1 + len(verifying)])
        reading_R.append(max(1.0, ms[-1] / ms[0]) if reading else 1.0)
    lengths = (0, *(num - 1 for num in layout.verify_tokens))
    logger.debug("decode steps with %s drafts: %s, reading on: %s", lengths, ms_RK, reading_R)
    return StepTimes(layout.decode_rows, lengths, ms_RK, reading_R)


def measure_bus(runner: Runner) -> float | None:
    """Bytes per second at which a decode step of one row fetches experts; None if all have slots.

    Call it after warm-up. Other experts are resident afterwards.
    """
    stored, moe = runner.offloaded[0], runner.cfg.moe
    assert moe is not None
    first, num_experts = int(stored.first_1), stored.num_experts
    kv_slot_T = torch.zeros(1, dtype=torch.int64, device=runner.platform.device)
    best = None
    for _ in range(BUS_REPEATS):
        slots = stored.residents.slot_I[first : first + num_experts].tolist()
        absent = [expert for expert, slot in enumerate(slots) if slot < 0][: moe.top_k]
        if not absent:
            return None
        chosen = absent + absent[:1] * (moe.top_k - len(absent))
        expert_TK = runner.platform.upload([chosen], torch.int32)
        runner.platform.synchronize()
        started = time.perf_counter()
        prepare(expert_TK, stored, kv_slot_T, num_pad_slots=0)
        runner.platform.synchronize()
        seconds = time.perf_counter() - started
        num_moved = min(len(absent), len(stored.residents.owner_S))
        best = max(best or 0.0, num_moved * stored.expert_bytes / seconds)
    return best


def _prefill_ms(runner: Runner, num_tokens: int, context: int = 0) -> float:
    """The milliseconds of a step of padding, on the slowest rank.

    With `context` it feeds the last of that many tokens, all in the padding block, in a row without
    a request.
    """
    state = runner.state
    bucket = runner.layout.prefill_bucket(num_tokens, 1)
    step = runner.buckets.prefill(*bucket)
    rows, nums = ([0], [num_tokens]) if context else ([], [])
    step.fill(runner.buckets.span_arrays(rows, nums, np.zeros(sum(nums), np.int64), *bucket))

    def place_row() -> None:
        state.pos_S[0] = max(0, context - num_tokens)

    best_ms = _best_ms(runner, step.replay, place_row)
    state.pos_S[0] = state.token_S[0] = 0
    return best_ms


def _best_ms(
    runner: Runner,
    replay: Callable[[], None],
    prepare: Callable[[], None] = lambda: None,
    repeats: int = STALL_REPEATS,
) -> float:
    """The least milliseconds of a few runs of a step, each after `prepare`, on the slowest rank."""
    synchronize = runner.platform.synchronize
    best_ms = math.inf
    for _ in range(repeats):
        prepare()
        synchronize()
        started = time.perf_counter()
        with torch.no_grad(), collectives.using(runner.group):
            replay()
        synchronize()
        taken_ns = int(1e9 * (time.perf_counter() - started))
        # all ranks use the same number, since they must run the same steps
        best_ms = min(best_ms, -runner.smallest(-taken_ns) / 1e6)
        if best_ms >= STALL_LONG_MS:
            break
    return best_ms
