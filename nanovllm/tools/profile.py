"""Profiles an engine's device: the kernels of prompts and of decode steps, and the bytes they move.

A captured step replays without ops: its trace has only names and times. So the same step is also
launched op by op, which shows the op of each kernel and the bytes that it must move.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.engine.engine import Engine
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.tools.costs import cost
from nanovllm.tools.kernel_table import MARK, Launch, kernel_table, read_kernels, read_launches

SHARES_OF_ROWS = (1, 2, 8)  # windows at the full batch, a half, an eighth, and one row


def profile_decode(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    folder: Path,
    *,
    activities: Sequence[ProfilerActivity],
    bandwidth: float,
    num_steps: int = 8,
) -> list[dict[str, Any]]:
    """Run a workload; profile its prompts, and later on windows of `num_steps` decode steps.

    `activities` are those of the device, `bandwidth` its bytes per second. Writes into `folder`,
    for each window, trace_bs{rows}.json.gz (Chrome's format) and kernels_bs{rows}.json; the files
    of the prompts have "prefill" in place of "bs{rows}". Returns the contents of the JSON files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities):  # the profiler's first start takes seconds
        engine.runner.platform.synchronize()
    profiler = _Profiler(engine, folder, activities, bandwidth)
    reports: list[dict[str, Any]] = []
    targets: list[int] | None = None
    pairs = zip(prompts, params)
    ids = [engine.add_request(prompt, one, incremental=False) for prompt, one in pairs]
    try:
        reports.append(profiler.prompts(sum(map(len, prompts))))
        while engine.has_unfinished and targets != []:
            rows = steady_rows(engine, num_steps)
            if targets is None and rows:
                sizes = {1, *(len(rows) // share or 1 for share in SHARES_OF_ROWS)}
                targets = sorted(sizes, reverse=True)
            if targets and 0 < len(rows) <= targets[0]:
                targets = [target for target in targets if target < len(rows)]
                reports.append(profiler.window(rows, num_steps))
            else:
                engine.step()
    finally:
        engine.abort_all(ids)
    return reports


def _has_prompts(scheduler: Scheduler) -> bool:
    if scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs:
        return True
    return not all(request.is_decoding for request in scheduler.running)


def steady_rows(engine: Engine, num_steps: int) -> list[Request]:
    """The decoding requests, if the next `num_steps` steps all decode in one bucket; else []."""
    scheduler, layout = engine.scheduler, engine.runner.layout
    rows = [request for request in scheduler.running if request.may_decode]
    if scheduler.waiting or not all(request.is_decoding for request in scheduler.running):
        return []
    num_left = [request.max_output - request.num_scheduled_outputs for request in rows]
    num_lasting = sum(left >= num_steps for left in num_left)
    if not num_lasting or len(rows) > layout.decode_rows[-1]:
        return []
    return rows if layout.decode_bucket(num_lasting) == layout.decode_bucket(len(rows)) else []


class _Profiler(NamedTuple):
    """Profiles steps of an engine, and writes a trace and a table of kernels for each profile."""

    engine: Engine
    folder: Path
    activities: Sequence[ProfilerActivity]
    bandwidth: float

    def prompts(self, num_tokens: int) -> dict[str, Any]:
        """Profile the steps until no prompt is left that can run now. Reports no bytes: the steps
        are not run op by op."""

        def run() -> int:
            num_steps = 0
            while _has_prompts(self.engine.scheduler):
                self.engine.step()
                num_steps += 1
            return num_steps

        return self._profile("prefill", {"prompt_tokens": num_tokens}, run, [])

    def window(self, rows: list[Request], num_steps: int) -> dict[str, Any]:
        """Profile `num_steps` decode steps of `rows`, after one that runs op by op."""
        runner, num_rows = self.engine.runner, len(rows)
        bucket = runner.layout.decode_bucket(num_rows)
        # half-way through the window
        lengths = [request.num_computed + 1 + num_steps // 2 for request in rows]
        trace, mode = self.folder / f"trace_bs{num_rows}.json.gz", OpBytes(lengths)
        with profile(activities={ProfilerActivity.CPU, *self.activities}) as by_op:
            runner.decode_uncaptured(bucket, mode, [request.row for request in rows])
            runner.platform.synchronize()
        by_op.export_chrome_trace(str(trace))
        launches = read_launches(_events(trace), mode.ops)

        def run() -> int:
            for _ in range(num_steps):
                self.engine.step()
            return num_steps

        about = {"rows": num_rows, "bucket": bucket, "context_tokens": sum(lengths)}
        return self._profile(f"bs{num_rows}", about, run, launches)

    def _profile(
        self, name: str, about: dict[str, Any], run: Callable[[], int], launches: Sequence[Launch]
    ) -> dict[str, Any]:
        """Profile `run`, which returns its number of steps."""
        trace = self.folder / f"trace_{name}.json.gz"
        with profile(activities=self.activities) as recorded:
            started = time.perf_counter()
            num_steps = run()
            self.engine.runner.platform.synchronize()
            wall_us = (time.perf_counter() - started) * 1e6
        recorded.export_chrome_trace(str(trace))
        table = kernel_table(read_kernels(_events(trace)), launches, num_steps, self.bandwidth)
        report = {**about, "wall_us": round(wall_us / num_steps, 1), **table}
        (self.folder / f"kernels_{name}.json").write_text(json.dumps(report, indent=1))
        return report


class OpBytes(TorchDispatchMode):
    """Records the bytes of each op, and marks the op in the profiler's trace.

    `lengths`: tokens per row.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = lengths
        self.ops: list[tuple[str, int]] = []  # (name and shape of the weight, bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with record_function(f"{MARK}{len(self.ops)}"):
            result = func(*args, **(kwargs or {}))
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        weight: Any = named.get("mat2", named.get("weight", named.get("code")))
        label = func._schema.name.split("::")[1]
        if isinstance(weight, Tensor) and weight.dim() == 2:
            label += " " + "×".join(map(str, weight.shape))
        num_bytes, _ = cost(func, args, kwargs or {}, result, self.lengths)
        self.ops.append((label, num_bytes))
        return result


def _events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]
