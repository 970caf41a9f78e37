"""The embedded model gives the tokens of eager mode in every decode bucket of the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams, platforms

# scripts import each other as files of one folder
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tiny.tasks import held_out

GREEDY = SamplingParams(temperature=0, max_tokens=24)


class Engines:
    """Both modes in one dtype, questions for the largest bucket, and eager mode's answers."""

    def __init__(self, device: str, dtype: str) -> None:
        self.ladder = platforms.select(device).traits.decode_rows
        options = {
            "device": device,
            "dtype": dtype,
            "max_num_seqs": self.ladder[-1],
            "max_model_len": 512,
        }
        self.graph, self.eager = (
            LLM("tiny-qwen3", **options),
            LLM("tiny-qwen3", enforce_eager=True, **options),
        )
        self.prompts = self.eager.chat_prompts(
            [task.messages for task in held_out(self.ladder[-1], seed=5)]
        )
        self.greedy = self.answer(self.eager, self.prompts, [GREEDY] * self.ladder[-1])

    def answer(
        self, llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
    ) -> list[list[int]]:
        return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]

    def in_bucket(
        self, num_rows: int, params: list[SamplingParams], monkeypatch: pytest.MonkeyPatch
    ) -> list[list[int]]:
        """Answers of graph mode to `num_rows` requests; checks that this bucket was used."""
        used: list[int] = []
        layout = type(self.graph.engine.runner.layout)
        choose = layout.decode_bucket
        monkeypatch.setattr(
            layout, "decode_bucket", lambda self, num: used.append(choose(self, num)) or used[-1]
        )
        answers = self.answer(self.graph, self.prompts[:num_rows], params[:num_rows])
        assert used and max(used) == num_rows
        return answers


@pytest.fixture(scope="module", params=["auto", "float32"])
def engines(request: pytest.FixtureRequest, device: str) -> Iterator[Engines]:
    both = Engines(device, request.param)
    yield both
    both.graph.close()
    both.eager.close()


def test_greedy_tokens_are_those_of_eager_mode(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_rows in engines.ladder:
        with monkeypatch.context() as patch:
            answers = engines.in_bucket(num_rows, [GREEDY] * num_rows, patch)
        assert answers == engines.greedy[:num_rows], f"bucket of {num_rows}"


def test_seeded_samples_do_not_hang_on_the_bucket(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temperature is high enough that many answers differ from the greedy ones."""
    largest = engines.ladder[-1]
    params = [SamplingParams(temperature=3.0, max_tokens=24, seed=1000 + i) for i in range(largest)]
    expected = engines.answer(engines.eager, engines.prompts, params)
    assert expected != engines.greedy
    for num_rows in engines.ladder:
        with monkeypatch.context() as patch:
            answers = engines.in_bucket(num_rows, params, patch)
        assert answers == expected[:num_rows], f"bucket of {num_rows}"
