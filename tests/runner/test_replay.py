"""A plan is the runner's only input: a stored plan gives the same result in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams, env
from nanovllm.schedule.plan import LogitEdits, StepPlan, StepResult

OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 6,
    "max_model_len": 128, "max_num_batched_tokens": 32, "kvcache_block_size": 16,
    "num_kvcache_blocks": 40, "draft_lengths": (2,),
}  # fmt: skip
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"top_k": 5, "top_p": 0.9, "seed": 4},
    {"temperature": 0, "repetition_penalty": 1.4, "logprobs": 2},
    {"min_tokens": 5, "prompt_logprobs": 1},
]  # fmt: skip


def plain(result: StepResult) -> list[Any]:
    logprobs = [part for part in (result.logprobs, *result.prompt_logprobs) if part is not None]
    return [result.tokens, [[array.tolist() for array in part] for part in logprobs]]


def replay(folder: Path, options: dict[str, Any]) -> None:
    """Run the stored plans; the other process knows only the plans and the model's options."""
    llm = LLM("tiny-qwen3", **options)
    paths = sorted(folder.glob("*.plan"))
    results = [
        llm.engine.runner.launch(StepPlan.from_bytes(path.read_bytes())).wait() for path in paths
    ]
    (folder / "results.json").write_text(json.dumps([plain(result) for result in results]))


def test_written_plans_give_the_same_result_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM("tiny-qwen3", **OPTIONS)
    engine, results = llm.engine, []
    collect, launch = engine._answers.collect, engine.runner.launch

    def keep(plan: StepPlan, result: StepResult) -> None:
        results.append(plain(result))
        collect(plan, result)

    def masking(plan: StepPlan) -> Any:
        if len(plan.rows) == 1 and not plan.is_prefill:  # allow only even tokens
            mask = np.full((1, llm.engine.model_config.vocab_size // 32), 0x55555555, np.int32)
            sampling = replace(plan.sampling, masked=[0])
            plan = replace(plan, sampling=sampling, allowed_MW=mask)
        number = len(list(tmp_path.glob("*.plan")))
        (tmp_path / f"{number:04}.plan").write_bytes(plan.to_bytes())
        return launch(plan)

    monkeypatch.setattr(engine._answers, "collect", keep)
    monkeypatch.setattr(engine.runner, "launch", masking)
    engine.propose = lambda request: request.prompt_ids[:2]
    prompts = llm.chat_prompts(
        [[{"role": "user", "content": f"What is {i} + 45?"}] for i in range(5)]
    )
    llm.generate(
        [prompt * 2 for prompt in prompts], [SamplingParams(max_tokens=9, **one) for one in PARAMS]
    )
    engine.propose = None
    llm.generate([prompts[0]], SamplingParams(max_tokens=4))
    # both tokens, in turns: one after the other, and the same again, are bad words
    for edits in (LogitEdits({7: 2.0}, [7, 9], [[7, 7], [9, 9]]), None):
        engine.add_request(
            prompts[1], SamplingParams(temperature=0, max_tokens=6), incremental=False
        )
        engine.scheduler.waiting[-1].edits = edits
    while engine.has_unfinished:
        engine.step()
    plans = [StepPlan.from_bytes(path.read_bytes()) for path in sorted(tmp_path.glob("*.plan"))]
    assert {plan.is_prefill for plan in plans} == {True, False}
    assert any(plan.prompt_logprobs for plan in plans) and any(plan.histories for plan in plans)
    assert any(plan.sampling.forbidden for plan in plans)
    masked = next(i for i, plan in enumerate(plans) if plan.sampling.masked)
    assert results[masked][0][0][0] % 2 == 0, "the mask was kept"
    edited = [row[0][0] for (row, *_), plan in zip(results, plans) if plan.sampling.has_edits]
    assert edited in ([7, 9] * 3, [9, 7] * 3), "the edits were kept"
    command = [sys.executable, __file__, str(tmp_path), json.dumps(OPTIONS)]
    subprocess.run(command, env=env.for_children(), check=True, timeout=300)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


if __name__ == "__main__":
    replay(Path(sys.argv[1]), json.loads(sys.argv[2]))
