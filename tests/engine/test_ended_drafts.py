"""A head that does not read on in plain steps: its rows' drafts end, and those of others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanovllm.schedule.plan import StepPlan
from tests.engine.test_speculation_pairs import PROMPTS, heads, opened, speculative, target
from tests.engines import greedy, tokens

__all__ = ["heads", "target"]  # fixtures
GRAPHS: dict[str, Any] = {
    "enforce_eager": False, "graph_batch_sizes": [1, 2], "max_num_batched_tokens": 64,
}  # fmt: skip


@pytest.mark.parametrize("mode", [{}, GRAPHS], ids=["eager", "graph"])
def test_drafts_of_a_row_end_with_a_plain_step_without_its_head(
    mode: dict[str, Any], target: Path, heads: dict[str, Path]
) -> None:
    """The first request's fifth step is plain; a second one comes later, and has drafts."""
    prompts, params = PROMPTS[:2], greedy(40)
    with opened(target, **mode) as plain:
        expected = [tokens(plain, [one], params)[0] for one in prompts]
    options = {**speculative("eagle3", heads), "tuning": {"run_ahead": 1}}
    with opened(target, **{**mode, **options}) as llm:
        planner, engine = llm.engine.scheduler.planner, llm.engine
        assert planner is not None
        numbers = [3] * 4 + [0]
        planner.lengths.choose = lambda *_: numbers.pop(0) if numbers else 3  # type: ignore[method-assign]
        planner.lengths.ends = lambda _: True  # type: ignore[method-assign]
        plans: list[StepPlan] = []
        launch = engine.runner.launch

        def noting(plan: StepPlan) -> Any:
            plans.append(plan)
            return launch(plan)

        engine.runner.launch = noting  # type: ignore[method-assign]
        requests = []
        for num_steps, prompt in zip((20, 1000), prompts):
            engine.add_request(prompt, params, incremental=False)
            requests += engine.scheduler.waiting
            for _ in range(num_steps):
                if engine.has_unfinished:
                    engine.step()
        assert [one.output_ids for one in requests] == expected
    decoding = [plan for plan in plans if not plan.is_prefill]
    alone = [plan for plan in decoding if len(plan.rows) == 1][:12]
    assert [plan.drafts.rests for plan in alone] == [False] * 4 + [True] * 8
    together = [dict(zip(one.request_ids, one.num_tokens)) for one in decoding if len(one.rows) > 1]
    assert together
    first, second = (one.request_id for one in requests)
    assert {one[first] for one in together} == {1}
    assert {one[second] for one in together} == {1, 4}  # 1: the head has drafted nothing yet
