"""Rows with a grammar verify drafts of the device, with masks along them: their answers are those
without drafts, whatever drafts them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.schedule.plan import DRAFT, StepPlan
from nanovllm.structured import matcher
from nanovllm.structured_params import StructuredOutputsParams
from tests.conftest import save_tiny
from tests.engines import assert_all_free, greedy, random_prompts, save_tokenizer, tokens
from tests.runner import mtp_cases, test_dflash
from tests.runner.heads import EagleCase

NUM = 3
# The first lets models say nearly what they want, so drafts may be right.
FREE, LETTERS, FORCED = r"[^q]{30}", "[a-e]{9,20}", "x(abcdef|abcdxy){2,3}"
PROMPTS = [*random_prompts([19, 40, 7], seed=3), random_prompts([7], seed=4)[0] * 5]
SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 128, "kvcache_block_size": 16,
    "max_num_seqs": 5, "max_num_batched_tokens": 64, "num_kvcache_blocks": 60,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True}, "graph": {"graph_batch_sizes": (2, 5)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose masks take long have no drafts, and on a busy machine any may."""
    monkeypatch.setattr(matcher, "SLOW_S", 1e9)


def asked(temperature: float) -> list[SamplingParams]:
    """Rows with each grammar, some of which end within a step, and one without."""
    patterns = (FREE, LETTERS, FORCED)
    return [
        *(
            SamplingParams(
                temperature=temperature, seed=number, max_tokens=26, ignore_eos=True,
                structured_outputs=StructuredOutputsParams(regex=pattern),
            )
            for number, pattern in enumerate(patterns)
        ),
        greedy(30),
    ]  # fmt: skip


class Folders:
    """A model for each method, with a tokenizer, and what the method reads beside it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def target(self, method: str) -> Path:
        return self._once("mtp" if method == "mtp" else "target", self._save_target)

    def speculative(self, method: str) -> dict[str, Any]:
        """The option for a method."""
        found: dict[str, Any] = {"method": method, "num_speculative_tokens": NUM}
        if method == "draft_model":
            found["model"] = str(self.target(method))
        elif method in ("eagle3", "dflash"):
            found["model"] = str(self._once(method, _save_head))
        elif method == "ngram":
            found |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
        return found

    def _once(self, name: str, save: Callable[[Path], object]) -> Path:
        if name not in self._made:
            save(self._root / name)
            self._made[name] = self._root / name
        return self._made[name]

    def _save_target(self, folder: Path) -> None:
        if folder.name == "mtp":
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(mtp_cases.GLM, "vocab_size", 512)
                mtp_cases.MtpCase("glm4_moe").save(folder)
        else:
            folder.mkdir()
            save_tiny(folder, "qwen3", vocab_size=512, hidden_size=64, num_hidden_layers=4)
        save_tokenizer(folder)


def _save_head(folder: Path) -> None:
    if folder.name == "eagle3":
        EagleCase("midlayer").save(folder)
    else:
        test_dflash.save(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("folders"))


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[LLM]:
    llm = LLM(str(folder), **{**SIZES, **options})
    try:
        yield llm
        assert_all_free(llm)
    finally:
        llm.close()


def watch(llm: LLM) -> list[StepPlan]:
    """The plans of decode steps that the runner gets."""
    seen: list[StepPlan] = []
    runner = llm.engine.runner
    launch = runner.launch

    def noting(plan: StepPlan) -> Any:
        seen.extend([] if plan.is_prefill else [plan])
        return launch(plan)

    runner.launch = noting  # type: ignore[method-assign]
    return seen


def masked(plans: list[StepPlan]) -> list[list[int]]:
    """What rows with a grammar have verified."""
    return [plan.proposed(row) for plan in plans if len(plan.token_T) for row in
            plan.sampling.masked]  # fmt: skip


@pytest.fixture(scope="module")
def expected(folders: Folders) -> Callable[[str, float], list[list[int]]]:
    """The answers without drafts."""
    found: dict[tuple[Path, float], list[list[int]]] = {}

    def answers(method: str, temperature: float) -> list[list[int]]:
        key = folders.target(method), temperature
        if key not in found:
            with opened(key[0], enforce_eager=True) as llm:
                for other in (0.0, 1.2):
                    found[key[0], other] = tokens(llm, PROMPTS, asked(other))
        return found[key]

    return answers


@pytest.mark.parametrize("adapts", [False, True], ids=["always", "any"])
@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model", "eagle3", "dflash", "mtp"])
def test_answers_are_those_without_drafts(
    method: str, adapts: bool, folders: Folders, expected: Callable[[str, float], list[list[int]]]
) -> None:
    """With drafts in all steps, and with numbers of drafts that change."""
    tuning = {"adapt_draft_length": adapts, "run_ahead": 1}
    options = {"speculative_config": folders.speculative(method), "tuning": tuning}
    with opened(folders.target(method), **MODES["eager"], **options) as llm:
        plans, planner = watch(llm), llm.engine.scheduler.planner
        if planner is not None:
            numbers = [0, 0, 3, 3, 1, 3, 0, 3, 3, 3] * 50
            planner.lengths.choose = lambda *_: numbers.pop()  # type: ignore[method-assign]
            planner.lengths.ends = lambda *_: False  # type: ignore[method-assign]
        for temperature in (0.0, 1.2):
            found = tokens(llm, PROMPTS, asked(temperature))
            assert found == expected(method, temperature)
            assert llm.tokenizer is not None
            assert re.fullmatch(FORCED, llm.tokenizer.decode(found[2]))
        fed = masked(plans)
        # rows join some steps sooner or later, when their grammar is ready
        assert sum(len(one) == NUM for one in fed) > (3 if adapts else 10)
        counts = llm.engine.scheduler.counts
        assert counts.num_undrafted == 0 or adapts
        if method in ("ngram", "draft_model"):
            assert counts.num_accepted_tokens > counts.num_forced_tokens


@pytest.mark.parametrize("method", ["ngram", "eagle3"])
def test_captured_steps_give_the_same_answers(
    method: str, folders: Folders, expected: Callable[[str, float], list[list[int]]]
) -> None:
    tuning = {"adapt_draft_length": False, "run_ahead": 1}
    options = {"speculative_config": folders.speculative(method), "tuning": tuning}
    with opened(folders.target(method), **MODES["graph"], **options) as llm:
        for temperature in (0.0, 1.2):
            found = tokens(llm, PROMPTS, asked(temperature))
            assert found == expected(method, temperature)


def test_right_drafts_are_accepted_and_other_rows_run_ahead(
    folders: Folders, expected: Callable[[str, float], list[list[int]]]
) -> None:
    """Equal models agree, except where the grammar forbids what they would say."""
    tuning = {"adapt_draft_length": False, "run_ahead": 1}
    spec = folders.speculative("draft_model")
    with opened(
        folders.target(""), enforce_eager=True, speculative_config=spec, tuning=tuning
    ) as llm:
        tokens(llm, PROMPTS[:1], asked(0.0)[:1])  # the grammar is compiled then
        plans = watch(llm)
        both = [asked(0.0)[0], greedy(30)]
        (answer, _) = tokens(llm, [PROMPTS[0], PROMPTS[3]], both)
        assert answer == expected("draft_model", 0.0)[0]
        masked_steps = [plan for plan in plans if plan.sampling.masked]
        assert len(masked_steps) < len(answer) * 0.6
        assert any(DRAFT in plan.token_T for plan in plans if not plan.sampling.masked), (
            "a step of the other row began before the tokens of the first were known"
        )
