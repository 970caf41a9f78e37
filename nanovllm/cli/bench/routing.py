"""How many experts a decode step reads: expected and measured, for a benchmark's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.engine.engine import Engine
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.request import Request
from nanovllm.tools.profile import steady_rows

MOST_TOKENS = 10  # per answer: the measured step is one of its last


class _Chosen(TorchDispatchMode):
    """Records the experts of each call that multiplies by experts, [rows, experts per token].

    Calls that move experts have mutable arguments and are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expert_RK: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "nanovllm" and not func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args):
                if argument.name == "expert":
                    self.expert_RK.append(value.clone())
        return func(*args, **(kwargs or {}))


def experts_per_step(
    engine: Engine, prompts: Sequence[list[int]], num_rows: int
) -> dict[str, float | int | None]:
    """The mean number of distinct experts per layer in a decode step of up to `num_rows` requests.
    "expected" assumes evenly spread routing, as the limit does. "measured" is counted in a step of
    the first prompts that runs op by op; None where a step is one program."""
    moe, runner = engine.model_config.moe, engine.runner
    assert moe is not None
    room = runner.layout.max_model_len
    ids = [
        engine.add_request(prompt, _params(min(MOST_TOKENS, room - len(prompt))), incremental=False)
        for prompt in prompts[:num_rows]
    ]
    chosen, rows = _Chosen(), list[Request]()
    try:
        while engine.has_unfinished and not _ends_soon(rows := steady_rows(engine, 1)):
            engine.step()
        if rows:
            bucket = runner.layout.decode_bucket(len(rows))
            runner.decode_uncaptured(bucket, chosen, [request.row for request in rows])
    finally:
        engine.abort_all(ids)
    counts = [len(expert_RK[: len(rows)].unique()) for expert_RK in chosen.expert_RK]
    return {
        "rows": len(rows),
        "expected": round(moe.distinct_experts(len(rows)), 2),
        "measured": round(sum(counts) / len(counts), 2) if counts else None,
    }


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=num_tokens)


def _ends_soon(rows: Sequence[Request]) -> bool:
    """True if one of these requests has one step left."""
    return any(row.max_output - row.num_scheduled_outputs <= 1 for row in rows)
